import itertools
import json
import os
import pickle
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patch_based_ddpm import checkpoint
from patch_based_ddpm import train as command
from patch_based_ddpm.data import cache as image_cache
from patch_based_ddpm.data.cache import CachedImages, build, open_cache, prepare_pixels
from patch_based_ddpm.data.dataset import FittedImages, ShuffledStream, TrainingImages, loader
from patch_based_ddpm.data.sources import UnreadableImage, list_folder, open_lmdb
from patch_based_ddpm.errors import InputError
from support.commands import metrics, running, train, wait_until, write_config
from support.lmdb_folders import IMAGES, write_lmdb
from support.runs import assert_same, timeless

HEADER = 128  # bytes of a .npy file before its values
IMAGE = 8 * 8 * 3
Usage = namedtuple("Usage", "total used free")


def write_images(folder, number, size=(20, 16), bad=()):
    """Noisy images, each its own; those in `bad` are cut off."""
    folder.mkdir(exist_ok=True)
    for index in range(number):
        pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        path = folder / f"{index:03}.png"
        Image.fromarray(pixels).save(path)
        if index in bad:
            path.write_bytes(path.read_bytes()[:200])
    return folder


def fitted(folder, channels=3, height=8, width=8):
    return FittedImages(list_folder(folder), channels, height, width)


def cache(path, images, on_bad_image="stop", num_workers=0):
    """The cache as it was built; another process opens the same one."""
    built = build(path, images, on_bad_image=on_bad_image, num_workers=num_workers)
    assert open_cache(path, built.stamp) == built
    return built


def assert_holds(cached, images, bad=()):
    """Every image but the bad ones, as it is read without a cache."""
    assert cached.size == images.size
    assert sorted(cached.unreadable) == list(bad)
    for index in set(range(images.size)) - set(bad):
        assert np.array_equal(cached.read(index, flip=False), images.read(index, flip=False))


@pytest.fixture
def reads(monkeypatch):
    """The indexes that are read from images, in order."""
    seen = []
    read = FittedImages.read

    def watched(images, index, flip):
        seen.append(index)
        return read(images, index, flip)

    monkeypatch.setattr(FittedImages, "read", watched)
    return seen


class TestCachedImages:
    def test_known_values(self, tmp_path):
        """Image 1 is 4 x 2, its middle 2 x 2 is kept; the file is one that numpy reads."""
        (tmp_path / "images").mkdir()
        Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "images" / "0.png")
        row = [[9, 9, 9], [10, 20, 30], [40, 50, 60], [9, 9, 9]]
        Image.fromarray(np.array([row, row], np.uint8)).save(tmp_path / "images" / "1.png")
        cached = cache(tmp_path / "cache.npy", fitted(tmp_path / "images", height=2, width=2))
        kept = np.load(tmp_path / "cache.npy")
        assert kept.dtype == np.uint8
        assert kept.tolist() == [[[[1, 2, 3]] * 2] * 2, [[[10, 20, 30], [40, 50, 60]]] * 2]
        assert cached.size == 2
        assert cached.read(1, flip=False).tolist() == kept[1].tolist()
        assert cached.read(1, flip=True).tolist() == [[[40, 50, 60], [10, 20, 30]]] * 2

    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("size", [(8, 8), (20, 16), (16, 32), (90, 50)])
    def test_equals_the_images_read_one_by_one(self, tmp_path, channels, size):
        """For even margins a flip too: (resized side - 8) is 0, 2, 8 and 6."""
        images = fitted(write_images(tmp_path / "images", 3, size), channels)
        cached = cache(tmp_path / "cache.npy", images)
        for index, flip in itertools.product(range(3), (False, True)):
            pixels = cached.read(index, flip)
            assert np.array_equal(pixels, images.read(index, flip))
            assert (pixels.shape, pixels.dtype, pixels.flags.writeable) == ((8, 8, channels), np.uint8, True)

    def test_flip_is_the_exact_mirror_where_the_margin_is_odd(self, tmp_path):
        images = fitted(write_images(tmp_path / "images", 1, size=(9, 8)))
        cached = cache(tmp_path / "cache.npy", images)
        assert np.array_equal(cached.read(0, flip=True), images.read(0, flip=False)[:, ::-1])
        assert np.array_equal(cached.read(0, flip=True)[:, :-1], images.read(0, flip=True)[:, 1:])

    def test_other_processes_are_sent_no_image(self, tmp_path):
        images = fitted(write_images(tmp_path / "images", 30, bad=[4]))
        cached = cache(tmp_path / "cache.npy", images, on_bad_image="skip")
        cached.read(0, flip=False)
        sent = pickle.dumps(cached)
        assert len(sent) < 1000 < cached.size * IMAGE
        assert_holds(pickle.loads(sent), images, bad=[4])

    def test_reading_maps_the_file_once(self, tmp_path, monkeypatch):
        cached = cache(tmp_path / "cache.npy", fitted(write_images(tmp_path / "images", 3)))
        first = cached.read(2, flip=False)
        monkeypatch.setattr(np, "load", None)
        assert np.array_equal(cached.read(2, flip=False), first)


def batches(pixels, num_workers, on_bad_image="stop"):
    images = TrainingImages(pixels, horizontal_flip=True, seed=3, on_bad_image=on_bad_image)
    stream = ShuffledStream(size=pixels.size, seed=5, process_index=0, num_processes=1, start=0)
    endless = loader(images, stream, batch_size=4, num_workers=num_workers, device=torch.device("cpu"))
    return list(itertools.islice(endless, 6))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there are fewer cores
class TestBatches:
    @pytest.mark.parametrize("bad", [(), (0, 5, 6, 10)])
    @pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
    def test_same_with_and_without_a_cache(self, tmp_path, bad, num_workers):
        images = fitted(write_images(tmp_path / "images", 11, bad=bad))
        mode = "skip" if bad else "stop"
        wanted = batches(images, 0, mode)
        got = batches(cache(tmp_path / "cache.npy", images, mode, num_workers), num_workers, mode)
        assert_same(got, wanted)
        assert set().union(*(skipped for _, skipped in got)) == set(bad)

    def test_nothing_readable(self, tmp_path):
        images = fitted(write_images(tmp_path / "images", 2, bad=[0, 1]))
        cached = cache(tmp_path / "cache.npy", images, on_bad_image="skip")
        for pixels in (images, cached):
            with pytest.raises(InputError, match=r"none of the 2 images can be used; of the last .*00\d\.png' cannot"):
                batches(pixels, 0, "skip")


class TestBuild:
    def test_a_finished_cache_is_used_again(self, tmp_path, reads, capsys):
        images = fitted(write_images(tmp_path / "images", 3))
        cache(tmp_path / "cache.npy", images)
        assert reads == [0, 1, 2]
        assert "image cache: 100%" in capsys.readouterr().err
        written = (tmp_path / "cache.npy").stat().st_mtime_ns
        cache(tmp_path / "cache.npy", images)
        assert reads == [0, 1, 2]
        assert (tmp_path / "cache.npy").stat().st_mtime_ns == written
        assert capsys.readouterr().err == ""
        assert {path.name for path in tmp_path.iterdir()} == {"images", "cache.npy", "cache.json"}

    @pytest.mark.parametrize("change", ["size", "time", "name", "gone", "new", "height", "channels", "format"])
    def test_built_anew_when_something_changed(self, tmp_path, monkeypatch, change):
        folder = write_images(tmp_path / "images", 3)
        before = cache(tmp_path / "cache.npy", fitted(folder))
        before.read(0, flip=False)
        old, status = np.array(before._array), (folder / "001.png").stat()
        if change in ("size", "time"):
            image = np.full((16, 20, 3), 77, np.uint8)
            Image.fromarray(image).save(folder / "001.png")
            if change == "size":
                os.utime(folder / "001.png", ns=(status.st_atime_ns, status.st_mtime_ns))
            else:
                data = (folder / "001.png").read_bytes()
                (folder / "001.png").write_bytes(data + b"\0" * (status.st_size - len(data)))
                os.utime(folder / "001.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
                assert (folder / "001.png").stat().st_size == status.st_size
        elif change == "name":
            (folder / "001.png").rename(folder / "009.png")
        elif change == "gone":
            (folder / "001.png").unlink()
        elif change == "new":
            shutil.copy2(folder / "001.png", folder / "0005.png")
        elif change == "format":
            monkeypatch.setattr(image_cache, "FORMAT", image_cache.FORMAT + 1)
            monkeypatch.setattr(FittedImages, "read", lambda *_, flip: np.full((8, 8, 3), 5, np.uint8))
        images = fitted(folder, height=4 if change == "height" else 8, channels=1 if change == "channels" else 3)
        assert_holds(cache(tmp_path / "cache.npy", images), images)
        assert np.array_equal(before._array, old)  # a process that still has the old cache keeps it

    def test_of_a_database(self, tmp_path):
        blue, broken = list(IMAGES)[2:]
        write_lmdb(tmp_path / "db", IMAGES | {broken: IMAGES[blue]})
        images = FittedImages(open_lmdb(tmp_path / "db", None), 3, 4, 4)
        assert_holds(cache(tmp_path / "cache.npy", images), images)
        write_lmdb(tmp_path / "db", {b"\0": IMAGES[blue], broken: IMAGES[broken]})
        images = FittedImages(open_lmdb(tmp_path / "db", None), 3, 4, 4)
        cached = cache(tmp_path / "cache.npy", images, on_bad_image="skip")
        assert_holds(cached, images, bad=[3])
        assert cached.read(0, flip=False)[0, 0].tolist() == [0, 0, 255]

    def test_global_generator_is_left_alone(self, tmp_path):
        before = torch.get_rng_state()
        cache(tmp_path / "cache.npy", fitted(write_images(tmp_path / "images", 3)))
        assert torch.equal(torch.get_rng_state(), before)

    def test_another_cache_is_not_opened(self, tmp_path):
        path = tmp_path / "cache.npy"
        assert open_cache(path, "stamp") is None
        stamp = build(path, fitted(write_images(tmp_path / "images", 3)), on_bad_image="stop", num_workers=0).stamp
        assert open_cache(path, stamp).size == 3
        assert open_cache(path, stamp + " ") is None

    def test_a_log_dir_that_another_process_does_not_share(self, tmp_path, make_config, monkeypatch):
        """The main process built a cache, and this one finds none."""
        folder, path = write_images(tmp_path / "images", 3), tmp_path / "cache.npy"
        config = make_config(trainer={"train_dataset_dir": str(folder), "cache_images": True})
        monkeypatch.setattr(image_cache, "build", lambda *_, **__: CachedImages(path, "stamp", 3, {}))
        with pytest.raises(InputError, match=r"cache\.npy' is not the one that the main process built; trainer\.log_d"):
            prepare_pixels(config, list_folder(folder), path)


class TestBadImages:
    def test_stop_names_it(self, tmp_path):
        images = fitted(write_images(tmp_path / "images", 5, bad=[2, 4]))
        with pytest.raises(UnreadableImage, match=r"^'[^\n]*002\.png' cannot be read: [^\n]*\.$"):
            cache(tmp_path / "cache.npy", images)

    @pytest.mark.slow
    def test_stop_names_it_from_a_worker(self, tmp_path):
        images = fitted(write_images(tmp_path / "images", 5, bad=[2, 4]))
        with pytest.raises(UnreadableImage, match=r"^'[^\n]*002\.png' cannot be read: [^\n]*\.$"):
            cache(tmp_path / "cache.npy", images, num_workers=1)

    def test_skip_goes_on_where_stop_stopped(self, tmp_path, reads):
        images = fitted(write_images(tmp_path / "images", 20, bad=[9]))
        with pytest.raises(UnreadableImage):
            cache(tmp_path / "cache.npy", images)
        reads.clear()
        cached = cache(tmp_path / "cache.npy", images, on_bad_image="skip")
        assert reads == list(range(9, 20))
        assert_holds(cached, images, bad=[9])

    def test_skip_remembers_the_sentence(self, tmp_path):
        images = fitted(write_images(tmp_path / "images", 5, bad=[2]))
        cached = cache(tmp_path / "cache.npy", images, on_bad_image="skip")
        with pytest.raises(UnreadableImage) as wanted:
            images.read(2, flip=False)
        with pytest.raises(UnreadableImage) as got:
            cached.read(2, flip=True)
        assert str(got.value) == str(wanted.value)
        assert_holds(cache(tmp_path / "cache.npy", images, on_bad_image="skip"), images, bad=[2])

    def test_stop_does_not_take_what_skip_left_out(self, tmp_path):
        images = fitted(write_images(tmp_path / "images", 5, bad=[4]))
        cache(tmp_path / "cache.npy", images, on_bad_image="skip")
        with pytest.raises(UnreadableImage, match=r"004\.png' cannot be read"):
            cache(tmp_path / "cache.npy", images)

    def test_an_image_that_could_not_be_read_for_a_while(self, tmp_path, reads):
        """A disk that failed leaves no trace in the files; the last image makes the file's end."""
        images = fitted(write_images(tmp_path / "images", 5))
        read = type(images.source).read

        def fail(source, index):
            if index in (1, 4):
                raise UnreadableImage(f"{index} is away.")
            return read(source, index)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(images.source), "read", fail)
            cached = cache(tmp_path / "cache.npy", images, on_bad_image="skip")
        assert cached.unreadable == {1: "1 is away.", 4: "4 is away."}
        reads.clear()
        assert_holds(cache(tmp_path / "cache.npy", images, on_bad_image="skip"), images)
        assert reads[:2] == [1, 4]

    def test_file_that_vanished(self, tmp_path):
        images = fitted(write_images(tmp_path / "images", 3))
        (tmp_path / "images" / "001.png").unlink()
        assert_holds(cache(tmp_path / "cache.npy", images, on_bad_image="skip"), images, bad=[1])


class TestSpace:
    def disk(self, monkeypatch, free):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - free, free))

    def test_too_little_is_said_before_anything_is_read(self, tmp_path, monkeypatch, reads):
        images = fitted(write_images(tmp_path / "images", 10))
        needed = 10 * IMAGE
        self.disk(monkeypatch, needed - 1)
        with pytest.raises(InputError, match=r"cache\.npy' needs 1,920 more bytes, but only 1,919 are free there; "):
            cache(tmp_path / "cache.npy", images)
        assert reads == []
        assert [path.name for path in tmp_path.iterdir()] == ["images"]
        self.disk(monkeypatch, needed)
        cache(tmp_path / "cache.npy", images)
        assert (tmp_path / "cache.npy").stat().st_size == HEADER + needed
        self.disk(monkeypatch, 0)
        cache(tmp_path / "cache.npy", images)

    def test_what_is_there_counts(self, tmp_path, monkeypatch):
        images = fitted(write_images(tmp_path / "images", 10, bad=[6]))
        with pytest.raises(UnreadableImage):
            cache(tmp_path / "cache.npy", images)
        self.disk(monkeypatch, 4 * IMAGE - 1)
        with pytest.raises(InputError, match="needs 768 more bytes, but only 767"):
            cache(tmp_path / "cache.npy", images, on_bad_image="skip")

    def test_disk_that_fills_up_meanwhile(self, tmp_path):
        def full(_):
            raise OSError(28, "No space left on device")

        images = fitted(write_images(tmp_path / "images", 3))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(InputError, match=r"^the image cache '.*cache\.npy' cannot be built: No space left"):
                cache(tmp_path / "cache.npy", images)
        assert_holds(cache(tmp_path / "cache.npy", images), images)


SLOW_BUILD = """
import sys, time
from pathlib import Path
from patch_based_ddpm.data import cache
from patch_based_ddpm.data.dataset import FittedImages
from patch_based_ddpm.data.sources import list_folder

class Slow(FittedImages):
    def read(self, index, flip):
        time.sleep(0.02)
        return super().read(index, flip)

if __name__ == "__main__":
    folder, path, num_workers = sys.argv[1:]
    cache.IMAGES_BETWEEN_SAVES = 10
    images = Slow(list_folder(Path(folder)), 3, 8, 8)
    cache.build(Path(path), images, on_bad_image="skip", num_workers=int(num_workers))
"""


class TestInterruption:
    @pytest.mark.slow
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_killed_builds_end_in_the_same_file(self, tmp_path, num_workers, reads):
        images = fitted(write_images(tmp_path / "images", 200, bad=[3, 199]))
        cache(tmp_path / "whole.npy", images, "skip")
        (tmp_path / "slow.py").write_text(SLOW_BUILD)
        path = tmp_path / "cache.npy"
        line = [sys.executable, tmp_path / "slow.py", tmp_path / "images", path, num_workers]
        for enough in (10, 60):
            with running(line, tmp_path) as process:
                wait_until(lambda enough=enough: done_so_far(path) >= enough, process)
            done = done_so_far(path)
            assert done < 200
        reads.clear()
        cached = cache(path, images, "skip")
        assert reads == [3, *range(done, 200)]
        assert path.read_bytes() == (tmp_path / "whole.npy").read_bytes()
        assert cached.unreadable == cache(tmp_path / "whole.npy", images, "skip").unreadable

    def test_interrupted_by_hand(self, tmp_path, reads):
        images = fitted(write_images(tmp_path / "images", 20))
        read = FittedImages.read

        def interrupted(images, index, flip):
            if index == 17:
                raise KeyboardInterrupt
            return read(images, index, flip)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FittedImages, "read", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache(tmp_path / "cache.npy", images)
        reads.clear()
        cached = cache(tmp_path / "cache.npy", images)
        assert reads == [16, 17, 18, 19]  # read, but in the batch that was lost
        assert_holds(cached, images)

    @pytest.mark.parametrize("damage", ["ledger gone", "ledger cut", "ledger empty", "file gone", "file cut"])
    def test_damage_is_mended(self, tmp_path, damage):
        images = fitted(write_images(tmp_path / "images", 5))
        path, ledger = tmp_path / "cache.npy", tmp_path / "cache.json"
        cache(path, images)
        whole, which = path.read_bytes(), ledger if damage.startswith("ledger") else path
        if damage.endswith("gone"):
            which.unlink()
        elif damage.endswith("cut"):
            which.write_bytes(which.read_bytes()[:-10])
        else:
            which.write_text("{}")
        assert_holds(cache(path, images), images)
        assert path.read_bytes() == whole

    def test_ledger_never_counts_what_is_not_written(self, tmp_path, monkeypatch):
        """Whenever the ledger appears, the images it counts are in the file."""
        images = fitted(write_images(tmp_path / "images", 20))
        counted = []

        def watched(unfinished, ledger):
            done = json.loads(unfinished.read_text())["done"]
            counted.append(done)
            kept = np.load(tmp_path / "cache.npy")
            assert all(np.array_equal(kept[i], images.read(i, flip=False)) for i in range(done))
            os.replace(unfinished, ledger)

        monkeypatch.setattr(image_cache, "IMAGES_BETWEEN_SAVES", 1)
        monkeypatch.setattr(Path, "replace", watched)
        cache(tmp_path / "cache.npy", images)
        assert counted == [*range(1, 21), 20]


def done_so_far(path):
    try:
        return json.loads(path.with_suffix(".json").read_text())["done"]
    except FileNotFoundError:
        return 0


class TestTraining:
    """Images of 20 x 16 px at 16 x 16 px: the margin is even."""

    def test_endless_images_are_refused(self, tmp_path):
        config = write_config(tmp_path, cache_images=True)
        with pytest.raises(InputError, match=r"^trainer\.cache_images is true, but builtin:faces draws images without"):
            command.main(["--config", str(config), "--dry-run"])

    def test_a_dry_run_writes_nothing(self, tmp_path):
        images = write_images(tmp_path / "images", 3)
        config = write_config(tmp_path, train_dataset_dir=str(images), cache_images=True)
        command.main(["--config", str(config), "--dry-run"])
        assert not (tmp_path / "run").exists()

    def test_an_unreadable_image_stops_the_run_with_its_path(self, tmp_path):
        images = write_images(tmp_path / "images", 3, bad=[1])
        config = write_config(tmp_path, train_dataset_dir=str(images), cache_images=True)
        with pytest.raises(UnreadableImage, match=r"001\.png"):
            command.main(["--config", str(config)])
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    def test_resumes_without_reading_the_images(self, tmp_path, reads):
        images = write_images(tmp_path / "images", 5)
        config = str(write_config(tmp_path, train_dataset_dir=str(images), cache_images=True, preview_count=0))
        command.main(["--config", config])
        assert reads == [0, 1, 2, 3, 4]
        command.main(["--config", config, "--restart-step", "3"])
        assert reads == [0, 1, 2, 3, 4]
        assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_equals_training_without_a_cache(self, tmp_path, capfd, processes):
        images = write_images(tmp_path / "images", 7, bad=[2])
        held = {}
        for cached in (False, True):
            folder = tmp_path / str(cached)
            folder.mkdir()
            options = {"train_dataset_dir": str(images), "on_bad_image": "skip", "cache_images": cached}
            config = write_config(folder, **options)
            if processes == 1:
                command.main(["--config", str(config)])
                out, err = capfd.readouterr()
            else:
                done = train("--config", config, processes=processes)
                assert done.returncode == 0, done.stderr
                out, err = done.stdout, done.stderr
            assert f"on {processes} process(es)" in out
            assert err.count("image cache: 100%") == cached
            assert "002.png" in out + err
            held[cached] = checkpoint.read(folder / "run" / "checkpoints" / "model-6.pt")
            assert held[cached].pop("config").trainer.cache_images == cached
            assert (folder / "run" / "image_cache.npy").exists() == cached
        assert_same(held[True], held[False])
        assert held[True]["bad_images"] == [2]
        assert timeless(metrics(tmp_path / "True")) == timeless(metrics(tmp_path / "False"))

    @pytest.mark.slow
    def test_what_stops_the_build_is_one_sentence_of_every_process(self, tmp_path):
        images = write_images(tmp_path / "images", 7, bad=[2])
        done = train("--config", write_config(tmp_path, train_dataset_dir=str(images), cache_images=True), processes=2)
        assert done.returncode != 0
        assert "on 2 process(es)" in done.stdout
        sentences = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
        assert len(sentences) == 1
        assert "002.png' cannot be read" in sentences.pop()
        assert "patch_based_ddpm/" not in done.stderr.replace(str(tmp_path), "")  # the traceback is the launcher's

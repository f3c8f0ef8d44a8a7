import os

import numpy as np
import pytest
import torch
from PIL import Image

from patch_based_ddpm import Config
from patch_based_ddpm.data import faces
from patch_based_ddpm.data.dataset import FittedImages, to_uint8
from patch_based_ddpm.data.sources import UnreadableImage, list_folder
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation.image_sets import FACES_SEED, open_data, open_samples, shuffled
from support.lmdb_folders import RED, encoded, write_lmdb


def write(folder, count, size=(20, 16), mode="RGB"):
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True, parents=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number:06d}.png")
    return folder


def loaded(images, batch_size=2):
    return torch.cat(list(images.batches(range(len(images.indexes)), batch_size)))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_samples_are_what_the_files_hold(tmp_path, mode, channels):
    folder = write(tmp_path / "samples", 5, mode=mode)
    Image.new("RGB", (99, 99)).save(folder / "grid.png")
    images = open_samples(folder, leave_out="grid.png")
    assert images.shape == (channels, 16, 20)
    assert sorted(images.indexes) == list(range(5))
    for index, image in zip(images.indexes, to_uint8(loaded(images))):
        pixels = np.array(Image.open(folder / f"{index:06d}.png")).reshape(16, 20, channels)
        assert np.array_equal(image.permute(1, 2, 0), pixels)


def test_grids_below_the_folder_are_left_out_too(tmp_path):
    write(tmp_path / "samples" / "0-4", 2)
    Image.new("RGB", (99, 99)).save(tmp_path / "samples" / "0-4" / "grid.png")
    assert loaded(open_samples(tmp_path / "samples", leave_out="grid.png")).shape == (2, 3, 16, 20)


def test_an_animation_is_no_sample(tmp_path):
    """A trajectory may lie beside the samples; a still WebP is one of them, and a broken one is told."""
    folder = write(tmp_path / "samples", 3)
    frames = [Image.new("RGB", (24, 20), color) for color in ("red", "green", "blue")]
    frames[0].save(folder / "denoising.webp", save_all=True, append_images=frames[1:])
    assert loaded(open_samples(folder, leave_out="grid.png")).shape == (3, 3, 16, 20)
    Image.new("RGB", (20, 16)).save(folder / "still.webp")
    assert loaded(open_samples(folder, leave_out="grid.png")).shape == (4, 3, 16, 20)
    (folder / "broken.webp").write_bytes(b"RIFF")
    with pytest.raises(UnreadableImage, match=r"broken\.webp"):
        loaded(open_samples(folder, leave_out="grid.png"))


@pytest.mark.parametrize(("size", "mode"), [((16, 16), "RGB"), ((20, 16), "L")])
def test_a_sample_unlike_the_others_is_named(tmp_path, size, mode):
    folder = write(tmp_path / "samples", 3)
    Image.new(mode, size).save(folder / "000003.png")
    with pytest.raises(UnreadableImage, match=r"000003\.png' is 16 x .* the samples must be alike"):
        loaded(open_samples(folder, leave_out="grid.png"))


def test_folders_without_samples(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        open_samples(tmp_path / "none", leave_out="grid.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "grid.png")
    with pytest.raises(InputError, match=r"holds no image but grid\.png"):
        open_samples(tmp_path, leave_out="grid.png")
    Image.new("P", (9, 9)).save(tmp_path / "0.png")
    with pytest.raises(InputError, match=r"0\.png' has mode P; a sample must be L \(grey\), RGB or RGBA"):
        open_samples(tmp_path, leave_out="grid.png")


def test_real_images_are_cropped_as_for_training(tmp_path):
    folder = write(tmp_path / "data", 4, size=(50, 31))
    images = open_data(str(folder), (3, 16, 16), 10, tmp_path, "stop")
    training = FittedImages(list_folder(folder), 3, 16, 16)
    for index, image in zip(images.indexes, to_uint8(loaded(images))):
        assert np.array_equal(image.permute(1, 2, 0), training.read(index, flip=False))


def test_lsun(tmp_path):
    write_lmdb(tmp_path / "bedroom_train_lmdb", {name: encoded(RED, "png") for name in (b"a", b"b", b"c")})
    images = open_data(str(tmp_path / "bedroom_train_lmdb"), (3, 16, 16), 2, tmp_path, "stop")
    assert loaded(images).mean((0, 2, 3)).tolist() == [1, -1, -1]
    assert open_data(str(tmp_path / "bedroom_train_lmdb"), (3, 16, 16), 2, tmp_path, "stop").stamp() == images.stamp()
    assert (tmp_path / "lmdb_keys-bedroom_train_lmdb.npz").exists()


def test_some_of_the_images_are_taken_at_random_but_always_the_same(tmp_path):
    folder = write(tmp_path / "data", 30)
    images = open_data(str(folder), (3, 16, 16), 10, tmp_path, "stop")
    assert images.indexes == open_data(str(folder), (3, 16, 16), 10, tmp_path, "stop").indexes
    assert len(set(images.indexes)) == 10
    assert max(images.indexes) > 15
    assert shuffled(30, 10) == images.indexes == shuffled(30, 30)[:10]


def test_built_in_faces_are_none_that_a_model_has_seen(tmp_path):
    images = open_data("builtin:faces", (3, 32, 32), 3, tmp_path, "stop")
    expected = faces.draw(faces.attributes(2, FACES_SEED), 32, 32)
    assert np.array_equal(to_uint8(loaded(images)[2]).permute(1, 2, 0), expected)
    trainer = {"train_dataset_dir": "builtin:faces", "log_dir": "x", "seed": FACES_SEED}
    with pytest.raises(InputError, match=r"trainer\.seed"):
        Config.from_dict({"trainer": trainer, "model": {"dim": 8}})
    assert open_data("builtin:faces", (3, 32, 32), 4, tmp_path, "stop").stamp() != images.stamp()


def test_the_stamp_changes_with_whatever_counts(tmp_path):
    folder = write(tmp_path / "data", 3)

    def stamp(shape=(3, 16, 16), count=2):
        return open_data(str(folder), shape, count, tmp_path, "stop").stamp()

    first = stamp()
    assert stamp() == first
    assert len({first, stamp(shape=(1, 16, 16)), stamp(shape=(3, 16, 20)), stamp(count=3)}) == 4
    assert stamp(count=3) == stamp(count=100)  # there are no more
    os.utime(folder / "000001.png", ns=(0, 0))
    assert stamp() != first


def test_unreadable_images_stop_or_are_passed_over(tmp_path):
    folder = write(tmp_path / "data", 3)
    (folder / "000001.png").write_bytes(b"none")
    with pytest.raises(UnreadableImage, match=r"000001\.png' cannot be read"):
        loaded(open_data(str(folder), (3, 16, 16), 3, tmp_path, "stop"))
    assert loaded(open_data(str(folder), (3, 16, 16), 3, tmp_path, "skip")).shape == (3, 3, 16, 16)

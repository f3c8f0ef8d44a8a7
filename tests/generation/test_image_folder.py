import copy
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patch_based_ddpm.data import pictures
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.generation.image_folder import ImageFolder, check_place, digest

ORIGIN = {"digest": "a", "sampler": "ddpm", "steps": None, "model": {"dim": 8, "channels": 3}}


@pytest.fixture
def folder(tmp_path):
    return ImageFolder(tmp_path, (3, 8, 10))


def draw(folder, *seeds):
    for seed in seeds:
        folder.write(seed, torch.full((3, 8, 10), 0.5))


def seeds_in(folder):
    return sorted(int(path.stem) for path in folder.root.glob("*.png"))


def test_a_folder_is_claimed_once_and_joined_by_the_same(folder):
    folder.claim(ORIGIN, range(4), overwrite=False)
    draw(folder, 0, 1)
    folder.claim(dict(ORIGIN), range(2, 9), overwrite=False)
    folder.claim(dict(ORIGIN), range(4), overwrite=False)
    assert seeds_in(folder) == [0, 1]
    assert sorted(path.name for path in folder.root.iterdir()) == ["000000.png", "000001.png", "samples.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digest": "b"}, "holds images of another checkpoint; choose another --out-dir, or --overwrite."),
        ({"sampler": "ddim"}, 'holds images of another sampler ("ddpm" instead of "ddim"); choose'),
        ({"steps": 5}, "holds images of another steps (null instead of 5); choose"),
        ({"model": {"dim": 16, "channels": 3}}, "holds images of another model.dim (8 instead of 16); choose"),
    ],
)
def test_another_origin_is_refused_by_name(folder, change, words):
    folder.claim(ORIGIN, range(4), overwrite=False)
    draw(folder, 0, 7)
    with pytest.raises(InputError) as error:
        folder.claim(ORIGIN | change, range(4), overwrite=False)
    assert words in str(error.value)
    assert seeds_in(folder) == [0, 7]
    folder.claim(ORIGIN | change, range(4), overwrite=True)
    assert seeds_in(folder) == []  # of another origin, all of them go
    folder.claim(ORIGIN | change, range(4), overwrite=False)


def test_overwriting_the_same_origin_leaves_other_seeds(folder):
    folder.claim(ORIGIN, range(9), overwrite=False)
    draw(folder, 0, 1, 8)
    folder.claim(ORIGIN, range(4), overwrite=True)
    assert seeds_in(folder) == [8]


def test_images_without_a_manifest_are_strangers(folder):
    draw(folder, 3)
    folder.claim(ORIGIN, range(3), overwrite=False)
    folder.manifest.unlink()
    with pytest.raises(InputError, match=r"000003\.png exists without samples\.json, which"):
        folder.claim(ORIGIN, range(4), overwrite=False)
    assert not folder.manifest.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_damaged_manifest_is_unknown_origin(folder, content):
    folder.manifest.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"holds images of unknown origin \(samples\.json cannot be read\)"):
        folder.claim(ORIGIN, range(4), overwrite=False)


def test_what_is_complete(folder):
    assert not folder.is_complete(0)
    draw(folder, 0, 1, 2)
    assert folder.is_complete(0)
    whole = folder.path(1).read_bytes()
    for length in (0, 20, len(whole) // 2, len(whole) - 20):
        folder.path(1).write_bytes(whole[:length])
        assert not folder.is_complete(1)
    for place in range(8, len(whole) - 12):  # the last chunk holds nothing
        folder.path(1).write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert not folder.is_complete(1)
    Image.new("RGB", (8, 10)).save(folder.path(2))
    assert not folder.is_complete(2)
    Image.new("L", (10, 8)).save(folder.path(2))
    assert not folder.is_complete(2)
    assert list(folder.present(range(3))) != []


def test_a_folder_that_vanished_is_one_sentence(tmp_path):
    folder = ImageFolder(tmp_path / "gone", (3, 8, 10))
    with pytest.raises(InputError, match=r"000005\.png could not be written: No such file or directory; the images"):
        draw(folder, 5)


def test_a_folder_that_vanished_holds_no_images(tmp_path):
    assert list(ImageFolder(tmp_path / "gone", (3, 8, 10)).present(range(9))) == []


def test_places_where_no_folder_can_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "new", tmp_path / "new" / "below"):
        check_place(path)
    monkeypatch.chdir(tmp_path)
    check_place(Path("new"))
    with pytest.raises(InputError, match=r"--out-dir '.*file' cannot be used: '.*file' is a file\.$"):
        check_place(tmp_path / "file")
    with pytest.raises(InputError, match=r"--out-dir '.*file/a/b' cannot be used: '.*file' is a file\.$"):
        check_place(tmp_path / "file" / "a" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for path in (tmp_path, tmp_path / "new" / "below", Path("new")):
        with pytest.raises(InputError, match=rf"--out-dir '{path}' cannot be used: '.*' cannot be written to\.$"):
            check_place(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_manifest_that_cannot_be_written_leaves_nothing(folder, monkeypatch):
    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match=r"--out-dir '.*' cannot be used: No space left on device\.$"):
        folder.claim(ORIGIN, range(4), overwrite=False)
    assert list(folder.root.iterdir()) == []


def test_digest_is_of_names_types_and_values():
    network = torch.nn.Linear(3, 2)
    twin = copy.deepcopy(network)
    assert digest(network) == digest(twin)
    assert digest(network) != digest(twin.to(torch.bfloat16))
    with torch.no_grad():
        network.bias[0] += 1e-6
    assert digest(network) != digest(copy.deepcopy(twin).float())
    renamed = torch.nn.Sequential(network)
    assert digest(renamed) != digest(network)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_archive_holds_the_images_in_order(tmp_path, channels):
    folder = ImageFolder(tmp_path, (channels, 6, 8))
    seeds = (3, 1, 4, 10, 5)
    arrays = np.random.default_rng(0).integers(0, 256, (5, 6, 8, channels), dtype=np.uint8)
    for seed, array in zip(seeds, arrays):
        pictures.save_png(folder.path(seed), array[..., 0] if channels == 1 else array)
    folder.write_npz(seeds)
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], arrays)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz", *[".png"] * 5]
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert archive.testzip() is None

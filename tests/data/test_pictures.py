import os

import numpy as np
import pytest
import torch
from PIL import Image

from patch_based_ddpm.data.pictures import GAP, pixels, save_png, tile


def test_pixels_by_hand():
    image = torch.tensor([[[-1.0, 1.0]], [[0.0, -3.0]], [[5.0, -0.5]]])  # three channels of one row
    assert pixels(image).tolist() == [[[0, 128, 255], [255, 0, 64]]]
    assert pixels(image).dtype == np.uint8


def test_grey_pixels_have_no_channel():
    assert pixels(torch.tensor([[[-1.0, 0.2], [1.0, -0.2]]])).tolist() == [[0, 153], [255, 102]]
    assert pixels(torch.zeros(4, 2, 3)).shape == (2, 3, 4)


def test_tile_by_hand():
    """Three pictures of one row, two pixels: two columns, and white in the place of the fourth."""
    first, second, third = (np.full((1, 2), value, dtype=np.uint8) for value in (10, 20, 30))
    o = 255
    assert GAP == 2
    assert tile([first, second, third]).tolist() == [
        [o] * 10,
        [o] * 10,
        [o, o, 10, 10, o, o, 20, 20, o, o],
        [o] * 10,
        [o] * 10,
        [o, o, 30, 30, o, o, o, o, o, o],
        [o] * 10,
        [o] * 10,
    ]


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (4, 2, 2), (5, 2, 3), (7, 3, 3), (36, 6, 6)]
)
@pytest.mark.parametrize("channels", [(), (3,), (4,)])
def test_tile_puts_each_picture_in_its_place(count, rows, columns, channels):
    pictures = list(np.random.default_rng(0).integers(0, 255, (count, 3, 5, *channels), dtype=np.uint8))
    sheet = tile(pictures)
    assert sheet.shape == (rows * 5 + 2, columns * 7 + 2, *channels)
    assert sheet.dtype == np.uint8
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        area = np.s_[5 * row + 2 : 5 * row + 5, 7 * column + 2 : 7 * column + 7]
        np.testing.assert_array_equal(sheet[area], picture)
        sheet[area] = 255
    assert (sheet == 255).all()


@pytest.mark.parametrize(("channels", "mode"), [((), "L"), ((3,), "RGB"), ((4,), "RGBA")])
def test_a_saved_picture_reads_back_the_same(tmp_path, channels, mode):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, *channels), dtype=np.uint8)
    path = tmp_path / "picture.png"
    save_png(path, np.zeros_like(picture))
    save_png(path, picture)
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", mode)
        np.testing.assert_array_equal(np.asarray(image), picture)
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_a_save_that_fails_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    save_png(path, np.zeros((2, 2), dtype=np.uint8))
    before = path.read_bytes()

    def full_disk(self, file, format):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_png(path, np.ones((2, 2), dtype=np.uint8))
    assert path.read_bytes() == before


def test_two_processes_that_save_one_picture_do_not_meet(tmp_path, monkeypatch):
    """The other one saves it whole while this one flushes its bytes."""
    path, flush = tmp_path / "picture.png", os.fsync

    def flush_later(descriptor):
        monkeypatch.setattr(os, "fsync", flush)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            save_png(path, np.zeros((2, 2), dtype=np.uint8))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush_later)
    save_png(path, np.ones((2, 2), dtype=np.uint8))
    with Image.open(path) as image:
        assert (np.asarray(image) == 1).all()
    assert list(tmp_path.iterdir()) == [path]

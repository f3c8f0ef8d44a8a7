import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from patch_based_ddpm.generation import animation
from patch_based_ddpm.generation.animation import Animation


def grey(value):
    """Two images of one value in [0, 255]."""
    return torch.full((2, 3, 8, 8), value / 127.5 - 1)


def frames_and_times(path):
    with Image.open(path) as image:
        frames, times = [], []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.array(image.convert("RGB")).astype(int))
            times.append(image.info["duration"])
    return frames, times


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".GIF"])
@pytest.mark.parametrize(("kind", "shown"), [("x_t", 0), ("x_0", 100)])
def test_every_step_is_a_frame_and_the_last_one_stays(tmp_path, suffix, kind, shown):
    path, recorder = tmp_path / f"steps{suffix}", Animation(kind, borders=1)
    for i in range(5):
        recorder(9 - i, grey(10 * i), grey(100 + 10 * i))
    recorder.save(path, grey(200))
    frames, times = frames_and_times(path)
    values = [frame[4, 4].mean() for frame in frames]
    assert values == pytest.approx([shown, shown + 10, shown + 20, shown + 30, shown + 40, 200], abs=4)
    assert frames[0].shape == (2 + 8 + 2, 2 * (8 + 2) + 2, 3)
    assert times == [animation.FRAME_MS] * 5 + [animation.LAST_FRAME_MS]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("steps", [1, 59, 60, 61, 100, 250, 1000])
def test_frames_are_few_and_even(steps):
    recorder = Animation("x_t", borders=1)
    for i in range(steps):
        recorder(steps - 1 - i, torch.full((1, 1, 1, 1), i / 500 - 1), torch.zeros(1, 1, 1, 1))
    shown = [int(frame[2, 2]) for frame in recorder.frames]
    assert min(steps, 30) <= len(shown) <= 60
    every = next(k for k in (1, 2, 4, 8, 16, 32) if steps <= 60 * k)
    assert shown == [round((i / 500) * 127.5) for i in range(0, steps, every)]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_borders_take_no_pixel_away(channels):
    image = np.random.default_rng(0).integers(0, 250, (8, 12, channels), dtype=np.uint8)
    image = image[..., 0] if channels == 1 else image
    bordered = animation._with_borders(image, 4)
    assert bordered.shape == (11, 15, channels)[: image.ndim]
    assert (bordered[[2, 5, 8]] == 255).all()
    assert (bordered[:, [3, 7, 11]] == 255).all()
    assert np.array_equal(np.delete(np.delete(bordered, [2, 5, 8], axis=0), [3, 7, 11], axis=1), image)
    assert np.array_equal(animation._with_borders(image, 1), image)


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_images_too(tmp_path, suffix, channels):
    recorder = Animation("x_0", borders=2)
    for value in (-1.0, 0.0):
        recorder(0, torch.zeros(1, channels, 8, 8), torch.full((1, channels, 8, 8), value))
    recorder.save(tmp_path / f"steps{suffix}", torch.ones(1, channels, 8, 8))
    assert len(frames_and_times(tmp_path / f"steps{suffix}")[0]) == 3


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "steps.gif"
    path.write_bytes(b"old")

    def full(self, file, **options):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="full"):
        Animation("x_t", borders=1).save(path, grey(0))
    assert path.read_bytes() == b"old"


def test_file_names():
    assert animation.file_name("a/b.WebP").suffix == ".WebP"
    for text in ("a.png", "a", ".gif"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must end in \.webp or \.gif"):
            animation.file_name(text)

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from patch_based_ddpm.data.dataset import (
    FittedImages,
    ShuffledStream,
    TrainingImages,
    collate,
    fit,
    loader,
    to_float,
    to_mode,
    to_uint8,
)
from patch_based_ddpm.data.sources import FacesSource, UnreadableImage, list_folder
from patch_based_ddpm.errors import InputError

CPU = torch.device("cpu")
RED, BLUE = (255, 0, 0), (0, 0, 255)


class TestConversion:
    def test_known_values(self):
        floats = to_float(torch.tensor([0, 51, 102, 153, 204, 255], dtype=torch.uint8))
        assert floats.dtype == torch.float32
        torch.testing.assert_close(floats, torch.tensor([-1, -0.6, -0.2, 0.2, 0.6, 1]))
        assert floats[0] == -1
        assert floats[-1] == 1

    def test_round_trip_of_every_value(self):
        values = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(to_uint8(to_float(values)), values)

    def test_rounds_to_the_nearest_and_clamps(self):
        level = 1 / 127.5
        floats = torch.tensor([-1 + 0.4 * level, -1 + 0.6 * level, 1 - 0.4 * level, 1 - 0.6 * level, 1.1, -7])
        assert to_uint8(floats).tolist() == [0, 1, 255, 254, 255, 0]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_precisions_are_rounded_once(self, dtype):
        floats = torch.linspace(-1, 1, 999).to(dtype)
        assert (to_uint8(floats) - (floats.double() + 1) * 127.5).abs().max() <= 0.5 + 1e-5


def picture(mode, *values):
    """A picture of one row."""
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


def array(mode, values, dtype):
    """A picture of one row, of values in any number format."""
    values = np.array([values], dtype)
    return Image.frombytes(mode, values.shape[::-1], values.tobytes())


def palette(transparency=None):
    image = picture("P", 0, 1)
    image.putpalette([10, 20, 30, 200, 100, 0])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


SIXTEEN_BITS = [0, 128, 129, 32896, 65535]  # a level of 8 bits is 257 of these

# A picture of one row, and its pixels as grey, RGB and RGBA. Black of alpha 128 / 255 on white is 127, and the grey of
# a colour is 0.299 R + 0.587 G + 0.114 B.
CASES = {
    "L": (picture("L", 0, 77), [0, 77], [(0, 0, 0), (77, 77, 77)], [(0, 0, 0, 255), (77, 77, 77, 255)]),
    "1": (picture("1", 0, 1), [0, 255], [(0, 0, 0), (255,) * 3], [(0, 0, 0, 255), (255,) * 4]),
    "LA": (picture("LA", (0, 128), (9, 255)), [127, 9], [(127,) * 3, (9, 9, 9)], [(0, 0, 0, 128), (9, 9, 9, 255)]),
    "P": (palette(), [18, 118], [(10, 20, 30), (200, 100, 0)], [(10, 20, 30, 255), (200, 100, 0, 255)]),
    "P, clear": (palette(1), [18, 255], [(10, 20, 30), (255,) * 3], [(10, 20, 30, 255), (200, 100, 0, 0)]),
    "P, alpha": (palette(b"\0\xff"), [255, 118], [(255,) * 3, (200, 100, 0)], [(10, 20, 30, 0), (200, 100, 0, 255)]),
    "RGB": (picture("RGB", (255, 0, 0), (0, 0, 255)), [76, 29], [RED, BLUE], [(*RED, 255), (*BLUE, 255)]),
    "RGBA": (
        picture("RGBA", (255, 0, 0, 255), (0, 0, 0, 128), (7, 8, 9, 0)),
        [76, 127, 255],
        [RED, (127, 127, 127), (255, 255, 255)],
        [(*RED, 255), (0, 0, 0, 128), (7, 8, 9, 0)],
    ),
    "CMYK": (picture("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), [76, 29], [RED, BLUE], [(*RED, 255), (*BLUE, 255)]),
    "YCbCr": (picture("YCbCr", (90, 128, 128)), [90], [(90, 90, 90)], [(90, 90, 90, 255)]),
    "I;16": (array("I;16", SIXTEEN_BITS, "<u2"), [0, 0, 1, 128, 255], None, None),
    "I;16B": (array("I;16B", SIXTEEN_BITS, ">u2"), [0, 0, 1, 128, 255], None, None),
    "I": (array("I", SIXTEEN_BITS, "=i4"), [0, 0, 1, 128, 255], None, None),
    "F": (array("F", [0, 0.2, 0.4, 1], "=f4"), [0, 51, 102, 255], None, None),
}


class TestMode:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("case", CASES)
    def test_exact_colours(self, case, channels):
        image, grey, rgb, rgba = CASES[case]
        rgb = rgb or [(value,) * 3 for value in grey]
        rgba = rgba or [(value, value, value, 255) for value in grey]
        converted = to_mode(image, channels)
        assert converted.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        assert [converted.getpixel((x, 0)) for x in range(converted.width)] == {1: grey, 3: rgb, 4: rgba}[channels]

    def test_sixteen_bit_png_and_tiff(self, tmp_path):
        pixels = np.array([[0, 257 * 50, 65535]], np.uint16)
        for name in ("1.png", "2.tif"):
            Image.fromarray(pixels).save(tmp_path / name)
        source = list_folder(tmp_path)
        assert [np.asarray(to_mode(source.read(index), 1)).tolist() for index in (0, 1)] == [[[0, 50, 255]]] * 2

    @pytest.mark.parametrize(
        ("image", "limits"),
        [
            (array("I", [0, 70000], "=i4"), r"run from 0 to 70000; they must lie in \[0, 65535\]"),
            (array("I", [-1, 7], "=i4"), r"run from -1 to 7; they must lie in \[0, 65535\]"),
            (array("F", [0, 255], "=f4"), r"run from 0.0 to 255.0; they must lie in \[0, 1\]"),
            (array("F", [0, np.nan], "=f4"), r"run from nan to nan; they must lie in \[0, 1\]"),
        ],
    )
    def test_values_without_a_known_white_are_refused(self, image, limits):
        with pytest.raises(InputError, match=limits):
            to_mode(image, 3)

    def test_two_channels_are_refused(self):
        with pytest.raises(InputError, match="channels is 2; it must be 1"):
            to_mode(picture("L", 0), 2)


def noise_image(height, width):
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class TestFit:
    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize(("height", "width"), [(90, 61), (61, 90), (17, 16), (16, 16), (16, 31), (100, 7)])
    def test_square_is_as_published(self, height, width, flip):
        """Against torchvision's Resize, flip and CenterCrop; Pillow keeps the window's corners in single precision."""
        image = noise_image(height, width)
        published = v2.Resize(16)(image)
        if flip:
            published = v2.functional.horizontal_flip(published)
        published = np.asarray(v2.CenterCrop(16)(published)).astype(int)
        difference = np.abs(np.asarray(fit(image, 16, 16, flip)).astype(int) - published)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01

    @pytest.mark.parametrize(
        ("size", "target", "resized"),
        [((90, 61), (8, 24), (35, 24)), ((61, 90), (24, 8), (24, 35)), ((50, 100), (20, 30), (20, 40))],
    )
    def test_oblong_is_covered(self, size, target, resized):
        image = noise_image(*size)
        whole = np.asarray(image.resize(resized[::-1], Image.Resampling.BILINEAR)).astype(int)
        top, left = round((resized[0] - target[0]) / 2), round((resized[1] - target[1]) / 2)
        expected = whole[top : top + target[0], left : left + target[1]]
        assert np.abs(np.asarray(fit(image, *target, False)).astype(int) - expected).max() <= 1

    def test_flip_comes_before_the_crop(self):
        """Three columns to two: the crop drops the right one, so the flipped picture lacks what was the left one."""
        image = picture("L", 10, 20, 30)
        image = image.resize((3, 2), Image.Resampling.NEAREST)
        assert np.asarray(fit(image, 2, 2, False)).tolist() == [[10, 20]] * 2
        assert np.asarray(fit(image, 2, 2, True)).tolist() == [[30, 20]] * 2

    @pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
    @pytest.mark.parametrize("flip", [False, True])
    def test_extreme_shapes(self, size, flip):
        assert set(np.asarray(fit(Image.new("RGB", size, (1, 2, 3)), 512, 256, flip)).reshape(-1, 3).sum(1)) == {6}

    def test_clear_pixels_lend_no_colour(self):
        image = picture("RGBA", (255, 0, 0, 255), (0, 255, 0, 0)).resize((2, 2), Image.Resampling.NEAREST)
        assert fit(image, 1, 1, False).getpixel((0, 0)) == (255, 0, 0, 128)


def write_folder(folder, shades, bad=()):
    """Image k is grey of shade k, darker on its right half; those in `bad` are cut off."""
    for index, shade in enumerate(shades):
        image = Image.new("L", (8, 8), shade)
        image.paste(shade // 2, (4, 0, 8, 8))
        path = folder / f"{index:03}.png"
        image.save(path)
        if index in bad:
            path.write_bytes(path.read_bytes()[:50])
    return list_folder(folder)


def training_images(source, channels=1, height=8, width=8, horizontal_flip=False, seed=3, on_bad_image="stop"):
    return TrainingImages(FittedImages(source, channels, height, width), horizontal_flip, seed, on_bad_image)


def shade(image):
    return int(to_uint8(image).max())


class TestTrainingImages:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_known_pixels(self, tmp_path, channels):
        pixels = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]] * 2, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "1.png")
        image, skipped = training_images(list_folder(tmp_path), channels=channels, height=2, width=3)[0, 0]
        expected = {1: [[76, 150, 29]], 3: [[255, 0, 0], [0, 255, 0], [0, 0, 255]]}
        expected[4] = [*expected[3], [255, 255, 255]]
        assert image.shape == (channels, 2, 3)
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        assert torch.equal(to_uint8(image)[:, 0], torch.tensor(expected[channels], dtype=torch.uint8))
        assert torch.equal(image[:, 0], image[:, 1])
        assert skipped == ()

    def test_flip_is_a_fair_function_of_seed_epoch_and_index(self, tmp_path):
        source = write_folder(tmp_path, [200])

        @dataclass(frozen=True)
        class Same:
            size = 1000

            def read(self, index):
                return source.read(0)

        def flips(seed, epoch):
            images = training_images(Same(), horizontal_flip=True, seed=seed)
            return [bool(images[epoch, index][0][0, 0, 0] < images[epoch, index][0][0, 0, 7]) for index in range(200)]

        first = flips(3, 0)
        assert flips(3, 0) == first
        assert 75 <= sum(first) <= 125  # 3.5 standard deviations
        for other in (flips(4, 0), flips(3, 1)):
            assert 75 <= sum(np.not_equal(first, other)) <= 125

    def test_no_flip_when_off(self, tmp_path):
        images = training_images(write_folder(tmp_path, [200]))
        assert all(torch.equal(images[epoch, 0][0], images[0, 0][0]) for epoch in range(20))

    def test_stop_names_the_unreadable_image(self, tmp_path):
        images = training_images(write_folder(tmp_path, [200, 100], bad=[1]))
        assert shade(images[0, 0][0]) == 200
        with pytest.raises(UnreadableImage, match=r"^'.*001\.png' cannot be read: image file is truncated"):
            images[0, 1]

    def test_stop_names_the_image_that_cannot_be_converted(self, tmp_path):
        array("F", [0, 300], "=f4").save(tmp_path / "1.tif")
        with pytest.raises(UnreadableImage, match=r"1\.tif' cannot be used: its values run from 0\.0 to 300\.0; "):
            training_images(list_folder(tmp_path))[0, 0]

    def test_skip_takes_the_next_readable_image_round_the_end(self, tmp_path):
        source = write_folder(tmp_path, [10, 20, 30, 40, 50], bad=[0, 3, 4])
        images = training_images(source, on_bad_image="skip")
        taken = [images[0, index] for index in range(5)]
        assert [shade(image) for image, _ in taken] == [20, 20, 30, 20, 20]
        assert [skipped for _, skipped in taken] == [(0,), (), (), (3, 4, 0), (4, 0)]

    def test_skip_stops_when_nothing_is_readable(self, tmp_path):
        images = training_images(write_folder(tmp_path, [10, 20], bad=[0, 1]), on_bad_image="skip")
        with pytest.raises(InputError, match=r"none of the 2 images can be used; of the last .*000\.png' cannot"):
            images[0, 1]

    def test_endless_source(self):
        images = training_images(FacesSource(32, 32, seed=1), channels=3, height=32, width=32, on_bad_image="skip")
        expected = to_float(torch.from_numpy(np.array(images.pixels.source.read(10**6)))).permute(2, 0, 1)
        assert torch.equal(images[0, 10**6][0], expected)


def test_collate():
    first, second = torch.rand(3, 4, 5), torch.rand(3, 4, 5)
    images, skipped = collate([(first, ()), (second, (7, 8)), (first, (2,))])
    assert torch.equal(images, torch.stack([first, second, first]))
    assert skipped == (7, 8, 2)


def take(number, size, process_index=0, num_processes=1, start=0, seed=5):
    stream = ShuffledStream(size=size, seed=seed, process_index=process_index, num_processes=num_processes, start=start)
    return list(itertools.islice(stream, number))


class TestShuffledStream:
    def test_each_epoch_is_a_new_permutation(self):
        stream = take(40, size=10)
        assert [epoch for epoch, _ in stream] == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
        orders = [[index for _, index in stream[first : first + 10]] for first in range(0, 40, 10)]
        assert all(sorted(order) == list(range(10)) for order in orders)
        assert len({tuple(order) for order in orders}) == 4
        assert take(40, size=10, seed=6) != stream

    @pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
    def test_processes_share_each_epoch(self, num_processes):
        """7 epochs of 10 images, dealt to W processes: together they take each image once an epoch, in one order."""
        shares = [take(-(-70 // num_processes), 10, rank, num_processes) for rank in range(num_processes)]
        together = [sample for turn in zip(*shares, strict=True) for sample in turn][:70]
        assert together == take(70, size=10)
        assert Counter(together) == Counter(itertools.product(range(7), range(10)))

    @pytest.mark.parametrize("size", [1, 3, 10, None])
    @pytest.mark.parametrize("start", [0, 1, 9, 10, 23])
    def test_resuming_gives_the_tail(self, size, start):
        whole = take(50, size, process_index=1, num_processes=3)
        assert take(50 - start, size, process_index=1, num_processes=3, start=start) == whole[start:]

    def test_resuming_far_ahead_takes_no_walk(self):
        epochs = [epoch for epoch, _ in take(3, size=10, start=10**17 - 1)]
        assert epochs == [10**16 - 1, 10**16, 10**16]

    def test_endless_source_is_taken_in_order(self):
        assert take(3, None, process_index=2, num_processes=4, start=5) == [(0, 22), (0, 26), (0, 30)]

    def test_order_is_what_it_was(self):
        """Runs that were started with an earlier version resume on the same stream."""
        assert take(5, size=5, seed=1234) == [(0, 3), (0, 1), (0, 0), (0, 4), (0, 2)]


def batches(images, number, num_workers, batch_size=4, start=0):
    stream = ShuffledStream(size=images.pixels.size, seed=5, process_index=0, num_processes=1, start=start)
    return list(
        itertools.islice(loader(images, stream, batch_size=batch_size, num_workers=num_workers, device=CPU), number)
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there are fewer cores
class TestLoader:
    @pytest.mark.slow
    def test_workers_change_nothing(self, tmp_path):
        source = write_folder(tmp_path, range(20, 130, 10), bad=[4])
        images = training_images(source, horizontal_flip=True, on_bad_image="skip")
        alone = batches(images, 7, num_workers=0)
        for num_workers in (1, 2):
            for (image, skipped), (expected, expected_skipped) in zip(
                batches(images, 7, num_workers), alone, strict=True
            ):
                assert torch.equal(image, expected)
                assert skipped == expected_skipped
        assert sum(skipped.count(4) for _, skipped in alone) in (2, 3)  # 28 samples of 11 images

    def test_data_set_smaller_than_a_batch(self, tmp_path):
        images = training_images(write_folder(tmp_path, [100, 50, 10]))
        (batch, skipped), (following, _) = batches(images, 2, num_workers=0, batch_size=8)
        assert batch.shape == (8, 1, 8, 8)
        assert skipped == ()
        shades = [shade(image) for image in torch.cat([batch, following])]
        assert [sorted(shades[first : first + 3]) for first in range(0, 15, 3)] == [[10, 50, 100]] * 5

    def test_resumes_within_an_epoch(self, tmp_path):
        images = training_images(write_folder(tmp_path, range(20, 130, 10)), horizontal_flip=True)
        whole = batches(images, 6, num_workers=0)
        tail = batches(images, 3, num_workers=0, start=12)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[3:], tail, strict=True))

    @pytest.mark.slow
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_unreadable_image_stops_with_one_sentence(self, tmp_path, num_workers):
        images = training_images(write_folder(tmp_path, [100, 50, 10], bad=[1]))
        with pytest.raises(UnreadableImage, match=r"^'[^\n]*001\.png' cannot be read: image file is [^\n]*\.$"):
            batches(images, 2, num_workers)

    def test_global_generator_is_left_alone(self, tmp_path):
        images = training_images(write_folder(tmp_path, [100, 50, 10]), horizontal_flip=True)
        before = torch.get_rng_state()
        batches(images, 2, num_workers=0)
        assert torch.equal(torch.get_rng_state(), before)

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from patch_based_ddpm.data.decoding import fit, to_mode
from patch_based_ddpm.data.sources import list_folder
from patch_based_ddpm.errors import InputError
from support.arrays import array

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(mode, *values):
    """A picture of one row."""
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


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

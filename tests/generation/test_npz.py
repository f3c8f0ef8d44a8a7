import zipfile

import numpy as np
import pytest

from patch_based_ddpm.data import pictures
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.generation import npz


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_holds_the_pictures_in_order(tmp_path, channels):
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (5, 6, 8, channels), dtype=np.uint8)
    names = [tmp_path / f"{number}.png" for number in (3, 1, 4, 10, 5)]
    for name, array in zip(names, arrays):
        pictures.save_png(name, array[..., 0] if channels == 1 else array)
    npz.write(tmp_path / "samples.npz", names)
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], arrays)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz", *[".png"] * 5]
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert archive.testzip() is None


def test_a_picture_of_another_size_is_named_and_nothing_takes_the_place(tmp_path):
    for name, side in (("a.png", 4), ("b.png", 5)):
        pictures.save_png(tmp_path / name, np.zeros((side, 4, 3), np.uint8))
    with pytest.raises(InputError, match=r"b\.png has the shape \(5, 4, 3\); it must be \(4, 4, 3\)"):
        npz.write(tmp_path / "samples.npz", [tmp_path / "a.png", tmp_path / "b.png"])
    assert not (tmp_path / "samples.npz").exists()

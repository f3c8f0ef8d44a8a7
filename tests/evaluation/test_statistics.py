import numpy as np
import pytest
import torch

from patch_based_ddpm.data import dataset
from patch_based_ddpm.evaluation import seams, sliced_wasserstein
from patch_based_ddpm.evaluation.ms_ssim import ms_ssim
from patch_based_ddpm.evaluation.statistics import Collector, ImageStatistics, stretch_of
from support.face_images import crowd, images
from support.statistics import collect


def assert_same(a, b, exact=False):
    assert a.count == b.count
    assert list(a.sums) == list(b.sums)
    assert list(a.rows) == list(b.rows)
    for name in a.sums:
        np.testing.assert_allclose(a.sums[name], b.sums[name], rtol=0 if exact else 1e-6, atol=0 if exact else 1e-7)
    for name in a.rows:
        np.testing.assert_array_equal(a.rows[name], b.rows[name])


@pytest.mark.parametrize("count", [1, 2, 7, 8, 31])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_stretches_cover_the_set_and_part_no_pair(count, processes):
    stretches = [stretch_of(count, process, processes) for process in range(processes)]
    assert [position for stretch in stretches for position in stretch] == list(range(count))
    assert all(stretch.start % 2 == 0 for stretch in stretches)
    assert max(map(len, stretches)) - min(map(len, stretches)) <= 3


def test_neither_batches_nor_processes_matter(monkeypatch):
    monkeypatch.setattr(sliced_wasserstein, "MOST_PATCHES", 5)  # the last two images give none
    pictures = images(crowd(7), 32, 32)
    features = lambda whole: whole.float().mean((2, 3))  # noqa: E731 - stands for a network
    expected = collect(pictures, extractor=features)
    assert {name: len(values) for name, values in expected.rows.items()} == {
        "patches of 32 px": 5,
        "patches of 16 px": 5,
        "features": 7,
    }
    for batch_size in (1, 2, 3):
        for processes in (1, 2, 3, 9):
            assert_same(collect(pictures, batch_size=batch_size, processes=processes, extractor=features), expected)


def test_what_is_taken_down():
    pictures = images(crowd(5), 32, 32)
    statistics = collect(pictures)
    rows, columns = seams.profiles(pictures)
    np.testing.assert_allclose(statistics.sums["profile rows"], rows.sum(0), atol=1e-6)
    np.testing.assert_allclose(statistics.sums["profile columns"], columns.sum(0), atol=1e-6)
    assert statistics.sums["pairs"] == 2  # the fifth image has no partner
    first, second = (ms_ssim(pictures[i : i + 1], pictures[i + 1 : i + 2]).item() for i in (0, 2))
    assert statistics.sums["ms_ssim"] == pytest.approx(first + second, abs=1e-3)
    assert collect(pictures[[0, 0, 3, 3]]).sums["ms_ssim"] == pytest.approx(2)


def test_images_count_as_they_would_lie_in_a_file():
    pictures = images(crowd(2), 32, 32)
    assert_same(collect(pictures + 0.4 / 127.5), collect(pictures), exact=True)
    assert_same(collect(dataset.to_float(dataset.to_uint8(pictures))), collect(pictures), exact=True)


def test_saved_statistics_are_loaded_and_damaged_ones_are_not(tmp_path):
    statistics, path = collect(images(crowd(3), 32, 32)), tmp_path / "statistics.npz"
    assert ImageStatistics.load(path) is None
    statistics.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.npz"]
    assert_same(ImageStatistics.load(path), statistics, exact=True)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"x" * 100):
        path.write_bytes(damaged)
        assert ImageStatistics.load(path) is None
    np.savez(path, count=np.array(object()))
    assert ImageStatistics.load(path) is None  # a pickle is not opened


def test_grey_images_and_images_of_many_shapes():
    collector = Collector(3, 0, faces=False, extractor=None)
    collector.add(torch.rand(3, 1, 20, 33))
    assert list(collector.result().rows) == ["patches of 20 x 33 px"]

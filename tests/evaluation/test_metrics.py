import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from patch_based_ddpm import GaussianDiffusion
from patch_based_ddpm.data import dataset
from patch_based_ddpm.evaluation import fid, metrics, seams, sliced_wasserstein
from patch_based_ddpm.evaluation.metrics import Figure, ImageStatistics, figures, share_of, table
from patch_based_ddpm.evaluation.ms_ssim import ms_ssim
from support import patches
from support.face_images import crowd, images, mixed
from support.statistics import collect


@pytest.fixture(autouse=True)
def _few_patches(monkeypatch):
    monkeypatch.setattr(sliced_wasserstein, "MOST_PATCHES", 2000)
    monkeypatch.setattr(sliced_wasserstein, "DIRECTIONS", 128)


@pytest.fixture(scope="module")
def faces():
    return images(crowd(100), 32, 32)


def assert_same(a, b, exact=False):
    assert a.count == b.count
    assert list(a.sums) == list(b.sums)
    assert list(a.vectors) == list(b.vectors)
    for name in a.sums:
        np.testing.assert_allclose(a.sums[name], b.sums[name], rtol=0 if exact else 1e-6, atol=0 if exact else 1e-7)
    for name in a.vectors:
        np.testing.assert_array_equal(a.vectors[name], b.vectors[name])


@pytest.mark.parametrize("count", [1, 2, 7, 8, 31])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shares_cover_the_set_and_part_no_pair(count, processes):
    shares = [share_of(count, process, processes) for process in range(processes)]
    assert [position for share in shares for position in share] == list(range(count))
    assert all(share.start % 2 == 0 for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 3


def test_neither_batches_nor_processes_matter(monkeypatch):
    monkeypatch.setattr(sliced_wasserstein, "MOST_PATCHES", 5)  # the last two images give none
    pictures = images(crowd(7), 32, 32)
    features = lambda whole: whole.float().mean((2, 3))  # noqa: E731 - stands for a network
    expected = collect(pictures, extractor=features)
    assert {name: len(values) for name, values in expected.vectors.items()} == {
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
    statistics, path = collect(images(crowd(3), 32, 32)), tmp_path / "statistics.pt"
    assert ImageStatistics.load(path) is None
    statistics.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.pt"]
    assert_same(ImageStatistics.load(path), statistics, exact=True)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"x" * 100):
        path.write_bytes(damaged)
        assert ImageStatistics.load(path) is None
    torch.save({"count": Path(), "sums": {}, "vectors": {}}, path)
    assert ImageStatistics.load(path) is None  # nothing but tensors is unpickled


def test_grey_images_and_images_of_many_shapes():
    statistics = collect(torch.rand(3, 1, 20, 33))
    assert list(statistics.vectors) == ["patches of 20 x 33 px"]


@pytest.mark.parametrize(
    ("shape", "faces", "measured"),
    [
        ((3, 32, 33), True, True),
        ((3, 32, 33), False, False),
        ((3, 31, 64), True, False),
        ((3, 64, 31), True, False),
        ((1, 32, 32), True, False),
    ],
)
def test_disagreement_is_of_faces_in_colour_that_are_large_enough(shape, faces, measured):
    names = collect(torch.rand(2, *shape), faces=faces).sums
    assert any(name.startswith("disagreement of ") for name in names) == measured


def by_name(rows):
    return {row.name: row for row in rows}


def test_a_set_beside_itself(faces):
    statistics = collect(faces)
    rows = by_name(figures(statistics, statistics, 2))
    assert rows["seam ratio, 2 x 2"] == ("seam ratio, 2 x 2", 1, None)
    assert rows["seam ratio, 2 x 2, shifted grid"].samples == 1
    assert [row.samples for name, row in rows.items() if name.startswith("SWD")] == [0, 0, 0]
    for name in ("MS-SSIM", "border contrast, 2 x 2", "disagreement", "disagreement of hair"):
        assert rows[name].samples == rows[name].data
    assert "FID" not in rows


def test_sets_are_ordered_as_they_should_be(faces):
    real = collect(images(crowd(100, seed=1), 32, 32))
    shuffled = mixed([faces.roll(shift, 0) for shift in range(4)], 2)
    same = faces[:1].expand(100, -1, -1, -1)
    good, bad, one = (by_name(figures(collect(generated), real, 2)) for generated in (faces, shuffled, same))
    assert good["seam ratio, 2 x 2"].samples == pytest.approx(1, abs=0.1)
    assert bad["seam ratio, 2 x 2"].samples > 1.5
    assert bad["seam ratio, 2 x 2, shifted grid"].samples < 1.2
    assert bad["disagreement"].samples > 20 * max(good["disagreement"].samples, good["disagreement"].data)
    assert bad["disagreement"].samples == pytest.approx(
        np.mean([row.samples for name, row in bad.items() if name.startswith("disagreement of ")])
    )
    assert good["SWD x 10^3, mean"].samples < bad["SWD x 10^3, mean"].samples < one["SWD x 10^3, mean"].samples
    assert one["MS-SSIM"].samples == pytest.approx(1)
    assert good["MS-SSIM"].samples == pytest.approx(good["MS-SSIM"].data, abs=0.05)


def test_every_figure_tells_degraded_sets_apart(faces):
    """Patches swapped between images and within them, a blur, and patches of other tints, beside as many real faces."""
    cells = patches.split(faces, 2).unflatten(0, (4, -1))
    tints = torch.rand(4, 100, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.6 - 0.3
    sets = {
        "faces": faces,
        "between": mixed([faces.roll(shift, 0) for shift in range(4)], 2),
        "within": patches.merge(cells.flip(0).flatten(0, 1), 2),
        "blurred": gaussian_blur(faces, 9, 2.0),
        "tinted": patches.merge((cells + tints).clamp(-1, 1).flatten(0, 1), 2),
    }
    real = collect(images(crowd(100, seed=1), 32, 32))
    rows = {name: by_name(figures(collect(generated), real, 2)) for name, generated in sets.items()}
    seam, disagreement, distance, likeness = (
        {name: found[figure].samples for name, found in rows.items()}
        for figure in ("seam ratio, 2 x 2", "disagreement", "SWD x 10^3, mean", "MS-SSIM")
    )
    assert max(seam["faces"], seam["blurred"]) < 1.1 < 2 < min(seam["tinted"], seam["within"], seam["between"])
    assert disagreement["faces"] < 0.001 < disagreement["blurred"] < 0.05
    assert min(disagreement["within"], disagreement["tinted"]) > 0.1
    assert disagreement["between"] > 2 * max(disagreement["within"], disagreement["tinted"])
    assert distance["faces"] < distance["tinted"] < distance["between"] < distance["within"] < distance["blurred"]
    assert likeness["between"] < likeness["tinted"] < likeness["within"] < likeness["faces"] < likeness["blurred"]


def test_a_set_alone_and_a_grid_without_borders(faces):
    statistics = collect(faces[:4])
    rows = figures(None, statistics, 1)
    assert [row.name for row in rows][:2] == ["MS-SSIM", "disagreement"]
    assert all(row.samples is None and row.data is not None for row in rows)
    assert not any("seam" in row.name for row in figures(statistics, statistics, 1))


def test_what_cannot_be_told_is_not_a_number():
    flat, single = collect(torch.zeros(2, 3, 32, 32)), collect(torch.rand(1, 3, 32, 32))
    rows = by_name(figures(single, flat, 2))
    assert math.isnan(rows["seam ratio, 2 x 2"].samples)
    assert math.isnan(rows["MS-SSIM"].samples)
    steps = torch.zeros(2, 3, 32, 32).index_fill(3, torch.arange(8), 1.0)  # seamless: its contrast is 0
    assert math.isnan(by_name(figures(single, collect(steps), 2))["seam ratio, 2 x 2"].samples)


def test_features_are_compared_where_both_sets_have_them(monkeypatch, faces):
    monkeypatch.setattr(fid, "compare", lambda generated, real: {"FID": float((generated - real).sum())})
    plain, extended = collect(faces[:4]), collect(faces[:4], extractor=lambda whole: torch.ones(len(whole), 2))
    other = ImageStatistics(4, plain.sums, {**plain.vectors, "features": torch.zeros(4, 2)})
    assert by_name(figures(extended, other, 2))["FID"].samples == 8
    assert "FID" not in by_name(figures(extended, plain, 2))


def test_every_figure_is_defined(monkeypatch, faces, make_config):
    monkeypatch.setattr(fid, "compare", lambda *_: dict.fromkeys(["FID", "KID x 10^3", "precision", "recall"], 0.0))
    statistics = collect(faces[:4], extractor=lambda whole: torch.ones(len(whole), 2))
    diffusion = GaussianDiffusion.from_config(make_config(model={"grids": 2, "image_size": 32}))
    rows = figures(statistics, statistics, 2) + metrics.overlap_figures(diffusion, [faces[:1]], None)
    names = [row.name for row in rows]
    assert all(any(name.startswith(known) for known in metrics.DEFINITIONS) for name in names)
    assert all(any(known in name for name in names) for known in metrics.DEFINITIONS)


def test_table():
    rows = [Figure("seam ratio", 1.23456, None), Figure("a", 1234.5, 0.1)]
    assert table(rows, (64, 10000)) == (
        "               samples    data\n"
        "images              64  10,000\n"
        "seam ratio      1.2346\n"
        "a           1,234.5000  0.1000"
    )
    assert table([Figure("a", None, 0.1)], (None, 5)) == "          data\nimages       5\na       0.1000"

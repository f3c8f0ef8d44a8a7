import pickle
import sys
import urllib.error
from pathlib import Path

import pytest
import torch

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation import fid
from patch_based_ddpm.evaluation.fid import Extractor, compare
from support.extractors import MeanColours, torch_fidelity


@pytest.fixture
def small(monkeypatch):
    """A small network in place of Inception."""
    monkeypatch.setitem(torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY, fid.INCEPTION, MeanColours)


def gaussian(count, deviations, mean):
    """Points whose mean and covariance are exactly the given ones, not only on average."""
    points = torch.randn(count, len(deviations), dtype=torch.float64)
    points = points - points.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(points.T.cov()), points.T, upper=False).T
    return whitened * torch.tensor(deviations) + torch.tensor(mean)


def test_frechet_distance_of_gaussians():
    """|mu_1 - mu_2|^2 + sum (s_1 - s_2)^2 where the covariances are diagonal."""
    first, second = gaussian(50, [1.0, 2.0, 0.5], [0.0, 1.0, 2.0]), gaussian(80, [3.0, 2.0, 1.0], [1.0, 1.0, 4.0])
    assert compare(first, second)["FID"] == pytest.approx(1 + 4 + 4 + 0.25, rel=1e-6)
    assert compare(first, first)["FID"] == pytest.approx(0, abs=1e-6)


def test_kernel_distance():
    """The unbiased estimate with the kernel (x y / d + 1)^3, here over all images because they are few."""
    a, b = torch.randn(30, 4), torch.randn(30, 4) + 0.5

    def kernel(x, y):
        return (x.double() @ y.double().T / 4 + 1) ** 3

    within = [(kernel(x, x).sum() - kernel(x, x).trace()) / (30 * 29) for x in (a, b)]
    expected = 1000 * (sum(within) - 2 * kernel(a, b).mean())
    assert compare(a, b)["KID x 10^3"] == pytest.approx(expected.item(), rel=1e-6)
    assert compare(a, b) == compare(a, b)


def test_precision_and_recall_by_hand():
    """Neighbourhoods reach to the third neighbour: 3 for each of 0, 1, 2, 3 at the ends, 2 in the middle."""
    real, generated = (
        torch.tensor([[place, 0.0] for place in places])
        for places in ([0, 1, 2, 3, 100, 101, 102, 103], [0.5, 1.5, 2.5, 5.5, -50])
    )  # of the generated ones three lie among real ones, one near 3, one far away
    found = compare(generated, real)
    assert found["precision"] == pytest.approx(4 / 5)
    assert found["recall"] == pytest.approx(4 / 8)
    assert compare(real, generated)["precision"] == found["recall"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("channels", [1, 3])
def test_features_of_images(channels):
    images = torch.full((2, channels, 4, 8), 10, dtype=torch.uint8)
    images[1, :, :, 4:] = 30
    extractor = Extractor(None, "cpu")
    assert extractor(images).tolist() == [[10.0] * 6, [10.0] * 3 + [30.0] * 3]
    assert extractor(images).dtype == torch.float32
    assert extractor.stamp == ["inception-v3-compat", "means", torch_fidelity.__version__, None]


@pytest.mark.usefixtures("small")
def test_weights_are_handed_over_and_name_the_features(tmp_path):
    stamps = []
    for number in range(2):
        path = tmp_path / f"{number}.pth"
        torch.save({"weight": torch.full((1,), number)}, path)
        extractor = Extractor(path, "cpu")
        assert extractor.network.weights == str(path)
        stamps.append(extractor.stamp)
    assert stamps[0] != stamps[1]


def test_a_missing_package_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match='torch-fidelity, which `pipenv install --categories "packages evaluate"`'):
        Extractor(None, "cpu")


def test_weights_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"missing\.pth: there is no such file"):
        Extractor(tmp_path / "missing.pth", "cpu")
    path = tmp_path / "weights.pth"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"weights\.pth: refused, because it is not a file of weights alone"):
        Extractor(path, "cpu")
    path.write_bytes(pickle.dumps(print, protocol=2))  # code
    with pytest.raises(InputError, match=r"weights\.pth: refused"):
        Extractor(path, "cpu")
    torch.save({"some": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="does not hold the weights of torch-fidelity's Inception network"):
        Extractor(path, "cpu")


def test_a_download_that_fails_is_told(monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", fail)
    with pytest.raises(InputError, match=r"cannot be downloaded: .*no network.*; give --inception-weights"):
        Extractor(None, "cpu")


def test_the_package_is_imported_only_where_it_is_used():
    assert "\nimport torch_fidelity" not in Path(fid.__file__).read_text(encoding="utf-8")

"""FID, KID, precision and recall by the package torch-fidelity, which is optional and imported only when it is used.

Shapes: `b` images, `m` images of a set, `f` features of an image.
"""

import hashlib
import pickle
from pathlib import Path

import torch
from torch import Tensor

from patch_based_ddpm.errors import InputError, explain_os_error

INCEPTION = "inception-v3-compat"  # torch-fidelity's name of the network that FID is defined by
NEIGHBOURS = 3  # the distance to the third nearest image is the radius of a neighbourhood; Kynkäänniemi et al. 2019
FEWEST_IMAGES = NEIGHBOURS + 1
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
ROWS_AT_A_TIME = 1024  # of the matrix of distances


class Extractor:
    """torch-fidelity's Inception network, which turns images into features.

    Args:
        weights: a file with the network's weights; None: torch-fidelity downloads the official ones.
        device: where the network goes.

    Raises:
        InputError: torch-fidelity is not installed, or the weights do not fit, hold code, or cannot be downloaded.
    """

    def __init__(self, weights: Path | None, device: torch.device | str) -> None:
        try:
            import torch_fidelity
            from torch_fidelity import registry, utils
        except ImportError:
            raise InputError(
                "FID, KID, precision and recall need the package torch-fidelity, which "
                '`pipenv install --categories "packages evaluate"` installs.'
            ) from None
        if weights is not None:
            _refuse_code(weights)
        layer = registry.FEATURE_EXTRACTORS_REGISTRY[INCEPTION].get_default_feature_layer_for_metric("fid")
        options = {"feature_extractor_weights_path": weights and str(weights)}
        try:
            with explain_os_error(
                "the weights of Inception cannot be downloaded", "; give --inception-weights a file of them"
            ):
                network = utils.create_feature_extractor(INCEPTION, [layer], cuda=False, verbose=False, **options)
        except RuntimeError:
            source = weights or "the downloaded file"
            raise InputError(f"{source} does not hold the weights of torch-fidelity's Inception network.") from None
        self.network, self.device = network.to(device), device
        digest = weights and hashlib.sha256(weights.read_bytes()).hexdigest()
        self.stamp = [INCEPTION, layer, torch_fidelity.__version__, digest]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Extract the features of uint8 images, (b, 1, H, W), taken as grey RGB, or (b, 3, H, W): (b, f) on the CPU."""
        (features,) = self.network(images.expand(-1, 3, -1, -1).to(self.device))
        return features.float().cpu()


def _refuse_code(weights: Path) -> None:
    """Read the file with `weights_only`, because torch-fidelity would run code that it holds."""
    try:
        torch.load(weights, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{weights}: there is no such file.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{weights}: refused, because it is not a file of weights alone ({error!r:.80}).") from None


def compare(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Compare two sets by their features.

    Args:
        generated: (m, f) float32 on the CPU; both sets have 4 images or more.
        real: (m', f).

    Returns:
        `FID`, the Fréchet distance of the Gaussians with the sets' means and covariances (Heusel et al. 2017);
        `KID x 10^3`, the mean over 100 pairs of random subsets of up to 1000 images, always the same ones (Bińkowski
        et al. 2018); `precision`, the share of generated images in the neighbourhood of a real one, and `recall`, the
        share of real images in that of a generated one (Kynkäänniemi et al. 2019, here over Inception's features).
    """
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    moments = [metric_fid.fid_features_to_statistics(features.double()) for features in (generated, real)]
    fid = metric_fid.fid_statistics_to_metric(*moments, verbose=False)
    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    kid = metric_kid.kid_features_to_metric(
        generated.double(), real.double(), kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False
    )
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": ROWS_AT_A_TIME, "save_cpu_ram": True}
    neighbourhoods = metric_prc.prc_features_to_metric(generated, real, **options, verbose=False)
    return {
        "FID": fid[metric_fid.KEY_METRIC_FID],
        "KID x 10^3": 1000 * kid[metric_kid.KEY_METRIC_KID_MEAN],
        "precision": neighbourhoods[metric_prc.KEY_METRIC_PRECISION],
        "recall": neighbourhoods[metric_prc.KEY_METRIC_RECALL],
    }

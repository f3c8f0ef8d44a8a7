"""A folder of drawn images: SEED.png files, and a manifest of the model and the settings that drew them.

All images of a folder come from one model and the same settings, so an interrupted job can be continued, and jobs with
other seeds can add images.
"""

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from patch_based_ddpm.config import DiffusionConfig, ModelConfig
from patch_based_ddpm.data import pictures
from patch_based_ddpm.errors import InputError, explain_os_error
from patch_based_ddpm.files import atomic_write, write_json
from patch_based_ddpm.samplers import SEED_LIMIT

MANIFEST, GRID_NAME, ARCHIVE_NAME = "samples.json", "grid.png", "samples.npz"


def check_place(path: Path) -> None:
    """Raise an `InputError` for an --out-dir that cannot be made or written to; makes nothing."""
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "cannot be written to" if nearest.is_dir() else "is a file"
        raise InputError(f"--out-dir {str(path)!r} cannot be used: {str(nearest)!r} {reason}.")


def explain_unwritten(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turn an `OSError` while a file is written into an `InputError`."""
    advice = "; the images before it stay, and the same command draws those that are missing"
    return explain_os_error(f"{path} could not be written", advice)


def digest(module: torch.nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of a module's weights."""
    total = hashlib.sha256()
    for name, values in module.state_dict().items():
        total.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        total.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


@dataclass(frozen=True)
class ImageFolder:
    """The folder `root` of images of the shape (c, H, W)."""

    root: Path
    shape: tuple[int, int, int]

    @property
    def manifest(self) -> Path:
        return self.root / MANIFEST

    def path(self, seed: int) -> Path:
        """The file of a seed's image."""
        return self.root / f"{seed:06d}.png"

    def claim(self, origin: dict[str, Any], seeds: Sequence[int], overwrite: bool) -> None:
        """Make the folder and write its manifest, or check that its manifest is the same.

        Args:
            origin: JSON data of all that an image depends on except its seed.
            seeds: of the images to be drawn.
            overwrite: first remove these images, or all images if they are of another origin.

        Raises:
            InputError: the folder holds images of another origin, or cannot be written to.
        """
        with explain_os_error(f"--out-dir {str(self.root)!r} cannot be used"):
            self.root.mkdir(parents=True, exist_ok=True)
            wanted, held = _completed(origin), None  # the manifest is missing or damaged
            with contextlib.suppress(OSError, ValueError):
                held = _completed(json.loads(self.manifest.read_text(encoding="utf-8")))
            if overwrite:
                for seed in seeds if held == wanted else list(self.present(range(SEED_LIMIT))):
                    self.path(seed).unlink(missing_ok=True)
            elif self.manifest.exists() and held != wanted:
                raise InputError(
                    f"{self.root} holds images of {_difference(held, wanted)}; choose another --out-dir, or "
                    "--overwrite."
                )
            elif not self.manifest.exists() and (found := next(self.present(seeds), None)) is not None:
                raise InputError(
                    f"{self.path(found)} exists without {MANIFEST}, which would say how it was drawn; choose another "
                    "--out-dir, or --overwrite."
                )
            if held != wanted:
                write_json(self.manifest, origin, shared=True)

    def present(self, seeds: Sequence[int]) -> Iterator[int]:
        """The seeds that have a file, in any order."""
        wanted = seeds if isinstance(seeds, range) else frozenset(seeds)
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:  # a removed folder has none
            for entry in entries:
                if re.fullmatch(r"\d{6,}\.png", entry.name) and (seed := int(entry.name[:-4])) in wanted:
                    yield seed

    def is_complete(self, seed: int) -> bool:
        """Whether the image is there, undamaged and of the right shape."""
        channels, height, width = self.shape
        try:
            with Image.open(self.path(seed)) as image:
                image.verify()  # every chunk to the last, with its checksum
                return image.size == (width, height) and len(image.getbands()) == channels
        except (OSError, SyntaxError, ValueError):  # Pillow raises the latter two for damaged PNG chunks
            return False

    def write(self, seed: int, image: torch.Tensor) -> None:
        """Write the image of a seed, (c, H, W) in [-1, 1], whole or not at all. Raises InputError."""
        with explain_unwritten(self.path(seed)):
            pictures.save_png(self.path(seed), pictures.pixels(image))

    def write_grid(self, seeds: Sequence[int]) -> None:
        """Write the images side by side to grid.png. Raises InputError."""
        with explain_unwritten(self.root / GRID_NAME):
            images = [np.array(Image.open(self.path(seed))) for seed in seeds]
            pictures.save_png(self.root / GRID_NAME, pictures.tile(images))

    def write_npz(self, seeds: Sequence[int]) -> None:
        """Write the images to samples.npz as `arr_0`, uint8 (images, H, W, c), one at a time. Raises InputError."""
        channels, height, width = self.shape
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(seeds), height, width, channels)}
        with (
            explain_unwritten(self.root / ARCHIVE_NAME),
            atomic_write(self.root / ARCHIVE_NAME, shared=True) as whole,
            zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive,
            archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            for seed in tqdm(seeds, desc=ARCHIVE_NAME, unit="image", dynamic_ncols=True):
                with Image.open(self.path(seed)) as image:
                    file.write(image.tobytes())


def _completed(origin: Any) -> Any:
    """An origin whose sections have the defaults of keys that the version which wrote it did not know."""
    if not isinstance(origin, dict):
        return origin
    complete = dict(origin)
    for name, section in {"model": ModelConfig, "diffusion": DiffusionConfig}.items():
        with contextlib.suppress(InputError, TypeError):  # then it differs from what is drawn now
            complete[name] = json.loads(json.dumps(asdict(section(**origin.get(name)))))
    return complete


def _difference(held: Any, wanted: dict[str, Any], section: str = "") -> str:
    """The first difference between two origins, in words."""
    if not isinstance(held, dict):
        return f"unknown origin ({MANIFEST} cannot be read)"
    for key, value in wanted.items():
        if held.get(key) != value:
            if key == "digest":
                return "another checkpoint"
            if isinstance(value, dict):
                return _difference(held.get(key), value, f"{key}.")
            return f"another {section}{key} ({json.dumps(held.get(key))} instead of {json.dumps(value)})"
    return "other settings"

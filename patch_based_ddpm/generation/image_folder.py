"""A folder of drawn images: SEED.png files, and a manifest of the model and the settings that drew them.

All images of a folder come from one model and the same settings, so that a job that was cut off can be finished, and
jobs with other seeds can add to it.
"""

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from patch_based_ddpm.data import pictures
from patch_based_ddpm.errors import InputError, explain_os_error
from patch_based_ddpm.files import atomic_write

MANIFEST, GRID_NAME, ARCHIVE_NAME = "samples.json", "grid.png", "samples.npz"


def check_place(path: Path) -> None:
    """Refuse an --out-dir that cannot be made or written to, before the model is loaded; makes nothing.

    Raises:
        InputError: it is one.
    """
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise InputError(f"--out-dir {str(path)!r} cannot be used: {str(nearest)!r} is a file.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--out-dir {str(path)!r} cannot be used: {str(nearest)!r} cannot be written to.")


def explain_unwritten(path: Path) -> AbstractContextManager[None]:
    """Turn an `OSError` while a file is written into an `InputError`."""
    advice = "; the images before it stay, and the same command draws those that are missing"
    return explain_os_error(f"{path} could not be written", advice)


def check_finite(seed: int, image: torch.Tensor) -> None:
    """Refuse an image that is not finite.

    Raises:
        InputError: it is not.
    """
    if not image.isfinite().all():
        raise InputError(
            f"the image of seed {seed} is not finite, which no picture can show; --dtype float32 or bf16 holds larger "
            "numbers than fp16."
        )


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights, their names, types and bytes."""
    total = hashlib.sha256()
    for name, values in module.state_dict().items():
        total.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        total.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


@dataclass(frozen=True)
class ImageFolder:
    """Where drawn images go.

    Attributes:
        root: the folder.
        shape: (c, H, W) of its images.
    """

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
            origin: JSON data of all that an image depends on, apart from its seed.
            seeds: the images that are going to be drawn.
            overwrite: first remove these images, or all images if they are of another origin.

        Raises:
            InputError: the folder holds images of another origin, or cannot be written to.
        """
        with explain_os_error(f"--out-dir {str(self.root)!r} cannot be used"):
            self.root.mkdir(parents=True, exist_ok=True)
            held = self._read_manifest()
            if overwrite:
                for seed in seeds if held == origin else list(self._all()):
                    self.path(seed).unlink(missing_ok=True)
            elif self.manifest.exists() and held != origin:
                raise InputError(
                    f"{self.root} holds images of {_difference(held, origin)}; choose another --out-dir, or "
                    "--overwrite."
                )
            elif not self.manifest.exists() and (found := next(self.present(seeds), None)) is not None:
                raise InputError(
                    f"{self.path(found)} exists without {MANIFEST}, which would say how it was drawn; choose another "
                    "--out-dir, or --overwrite."
                )
            if held != origin:
                with atomic_write(self.manifest, shared=True) as file:
                    file.write((json.dumps(origin, indent=2) + "\n").encode())

    def _read_manifest(self) -> Any:
        """Its JSON data; None if it is missing or damaged."""
        try:
            return json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _all(self) -> Iterator[int]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:  # removed meanwhile: no images
            for entry in entries:
                if re.fullmatch(r"\d{6,}\.png", entry.name):
                    yield int(entry.name[:-4])

    def present(self, seeds: Collection[int]) -> Iterator[int]:
        """Those of some seeds that have a file; `in` of the seeds should be fast."""
        return (seed for seed in self._all() if seed in seeds)

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
        """Write one image, whole or not at all.

        Args:
            seed: its name.
            image: (c, H, W) in [-1, 1].

        Raises:
            InputError: it is not finite, or cannot be written.
        """
        check_finite(seed, image)
        with explain_unwritten(self.path(seed)):
            pictures.save_png(self.path(seed), pictures.pixels(image))

    def write_grid(self, seeds: Sequence[int]) -> None:
        """Put images side by side in grid.png.

        Raises:
            InputError: it cannot be written.
        """
        with explain_unwritten(self.root / GRID_NAME):
            pictures.save_png(
                self.root / GRID_NAME, pictures.tile([np.array(Image.open(self.path(seed))) for seed in seeds])
            )

    def write_npz(self, seeds: Sequence[int]) -> None:
        """Put images into samples.npz as `arr_0`, uint8 (images, H, W, c), which other evaluators read.

        They are copied one at a time, so memory does not grow with their number.

        Raises:
            InputError: it cannot be written.
        """
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


def _difference(held: Any, wanted: dict[str, Any]) -> str:
    """How the origin of the images held differs, in words."""
    if not isinstance(held, dict):
        return f"unknown origin ({MANIFEST} cannot be read)"
    held, wanted = _flat(held), _flat(wanted)
    for key, value in wanted.items():
        if held.get(key) != value:
            if key == "digest":
                return "another checkpoint"
            return f"another {key} ({json.dumps(held.get(key))} instead of {json.dumps(value)})"
    return "other settings"


def _flat(origin: dict[str, Any]) -> dict[str, Any]:
    """`{"model": {"dim": 8}}` as `{"model.dim": 8}`."""
    flat = {}
    for key, value in origin.items():
        flat |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat

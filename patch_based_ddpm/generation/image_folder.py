"""A folder of drawn images: SEED.png files, and the manifest that says what drew them.

All files of a folder come from one model and one way of sampling, so that a job that was cut off can be finished, and
jobs with other seeds can join in.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from patch_based_ddpm.data import pictures
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.files import SUFFIX

MANIFEST = "samples.json"
GRID_NAME = "grid.png"
ABANDONED = 3600  # seconds after which nobody goes on writing an unfinished file


def check_place(path: Path) -> None:
    """Refuse a folder that cannot be made or written to, as far as looking tells; makes nothing.

    Raises:
        InputError: it is one.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"--out-dir {str(path)!r} is a file; it must be a folder.")
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise InputError(f"--out-dir {str(path)!r} cannot be used: {str(nearest)!r} is a file.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--out-dir {str(path)!r} cannot be used: {str(nearest)!r} cannot be written to.")


@contextlib.contextmanager
def said(path: Path) -> Iterator[None]:
    """Turn the failure to write a file into one sentence.

    Raises:
        InputError: it could not be written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} could not be written: {error.strerror or error}; the images before it stay, and the same command "
            "draws those that are missing."
        ) from None


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
class SampleFolder:
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
        """Where the image of a seed lies."""
        return self.root / f"{seed:06d}.png"

    def claim(self, origin: dict[str, Any], seeds: Sequence[int], overwrite: bool) -> None:
        """Write the manifest, or find that it says the same.

        Args:
            origin: JSON data of all that an image depends on, apart from its seed.
            seeds: the images that are going to be drawn.
            overwrite: remove these images, and everything of another origin, first.

        Raises:
            InputError: the folder holds images of another origin.
            OSError: it cannot be written to.
        """
        text = json.dumps(origin, indent=2) + "\n"
        self._remove_abandoned()
        if overwrite:
            self._remove(seeds if self._read_manifest() == origin else None)
        if not self.manifest.exists() and (found := next(self.present(seeds), None)) is not None:
            raise InputError(
                f"{self.path(found)} is there already and {MANIFEST} is not, which would say what drew it; choose "
                "another --out-dir, or --overwrite."
            )
        self._create_manifest(text)
        held = self._read_manifest()
        if held != origin:
            raise InputError(
                f"{self.root} holds images of {_difference(held, origin)}; choose another --out-dir, or --overwrite."
            )

    def _create_manifest(self, text: str) -> None:
        """Write it if there is none; of two jobs at once one wins, and the other one finds it whole."""
        unfinished = self.manifest.with_name(f"{MANIFEST}.{socket.gethostname()}-{os.getpid()}{SUFFIX}")
        try:
            with open(unfinished, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(unfinished, self.manifest)
            except FileExistsError:
                pass
            except OSError:  # no links here; that leaves a race of two jobs that start within the same millisecond
                if not self.manifest.exists():
                    unfinished.replace(self.manifest)
        finally:
            unfinished.unlink(missing_ok=True)

    def _read_manifest(self) -> Any:
        try:
            return json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _remove(self, seeds: Iterable[int] | None) -> None:
        """Remove the images of these seeds; None: all images and the manifest."""
        if seeds is None:
            self.manifest.unlink(missing_ok=True)
            seeds = list(self._all())
        for seed in seeds:
            self.path(seed).unlink(missing_ok=True)

    def _remove_abandoned(self) -> None:
        """Remove what killed jobs had begun to write, and nothing that another job is writing now."""
        with os.scandir(self.root) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX):
                    with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                        if time.time() - entry.stat().st_mtime > ABANDONED:
                            os.unlink(entry.path)

    def _all(self) -> Iterator[int]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:  # a folder that is gone has none
            for entry in entries:
                if re.fullmatch(r"\d{6,}\.png", entry.name):
                    yield int(entry.name[:-4])

    def present(self, seeds: Collection[int]) -> Iterator[int]:
        """Those of some seeds that have a file; `in` of the seeds should be fast."""
        return (seed for seed in self._all() if seed in seeds)

    def is_complete(self, seed: int) -> bool:
        """Whether the image is there, whole and of the right shape."""
        channels, height, width = self.shape
        try:
            with Image.open(self.path(seed)) as image:
                image.verify()  # every chunk to the last, with its checksum
                return image.size == (width, height) and len(image.getbands()) == channels
        except (OSError, SyntaxError, ValueError):  # the latter two are how Pillow calls broken PNG chunks
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
        with said(self.path(seed)):
            pictures.save_png(self.path(seed), pictures.pixels(image))


def _difference(held: Any, wanted: dict[str, Any]) -> str:
    """What the manifest of other images says, in words."""
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

"""The parts of a study: train a run, draw its samples, measure them beside real faces that no run has seen.

A part that is done lies in the study's results/ as NAME.json, with the settings it came from, beside a few of its
images; it is written last, so that a part that was cut off is not taken for done. Several processes may do the parts of
one study: each takes those whose folder no other one is at work in.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from patch_based_ddpm import sample, train
from patch_based_ddpm.config import Config
from patch_based_ddpm.data import pictures
from patch_based_ddpm.data.sources import BUILTIN_FACES
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation import image_sets, metrics
from patch_based_ddpm.evaluation.face_consistency import SMALLEST_READING
from patch_based_ddpm.evaluation.image_sets import ImageSet
from patch_based_ddpm.evaluation.statistics import Collector, ImageStatistics
from patch_based_ddpm.file_lock import file_lock
from patch_based_ddpm.files import write_json
from patch_based_ddpm.planning import planner
from patch_based_ddpm.studies.config import Run, StudyConfig

BATCH = 32  # images that are measured at a time
STRIP_PIXELS = 256  # width of the images beside a result
MOST_IN_STRIP = 8
WITHOUT_EFFECT = frozenset(  # keys of `trainer` that change nothing of what is learnt
    {
        *("log_dir", "num_workers", "log_every", "checkpoints_total_limit"),
        *("wandb_enabled", "wandb_project", "wandb_name"),
        *("preview_count", "preview_sampler", "preview_steps", "preview_eta", "preview_order"),
    }
)


class Part(NamedTuple):
    """One thing to measure.

    Attributes:
        name: of its files.
        place: what it writes to, which one process at a time may do: a run's name, or its own.
        settings: JSON data of all that the result depends on.
        measure: does the work, and returns the result as JSON data and the first images, uint8 (H, W, 3) each.
    """

    name: str
    place: str
    settings: dict[str, Any]
    measure: Callable[[], tuple[dict[str, Any], list[np.ndarray]]]


def check_unchanged(run: Run) -> None:
    """Make sure that what is trained already was trained as the study's configuration says.

    Raises:
        InputError: it was not.
    """
    if not run.folder.config.exists():
        return
    held = Config.load(run.folder.config).to_dict()
    for section, wanted in run.config.to_dict().items():
        for key, value in wanted.items():
            if key not in WITHOUT_EFFECT and held[section][key] != value:
                raise InputError(
                    f"{run.folder.root} was trained with {section}.{key} {json.dumps(held[section][key])}, but the "
                    f"study says {json.dumps(value)}; choose another trainer.log_dir, or remove that folder."
                )


class Parts:
    """What a study consists of.

    Args:
        config: the study.
        precision: of training: "no", "bf16" or "fp16".
    """

    def __init__(self, config: StudyConfig, precision: str) -> None:
        self.config = config
        self.study = config.study
        self.precision = precision
        self.results = config.folder / "results"
        self.locks = self.results / "locks"
        self.shape = (config.model.channels, *config.model.image_shape)
        self._reference = cache(self._collect_reference)

    def all(self) -> list[Part]:
        """In the order in which they are done: real faces, every model, seed after seed, the samplers."""
        by_seed = zip(*map(self.config.runs, self.config.models()), strict=True)
        runs = [run for runs in by_seed for run in runs]
        reference = self.config.runs(self.config.reference())
        samplers = [self.sampled(run, *pair) for pair in self.study.sampler_steps for run in reference]
        return [self.real(), *map(self.run, runs), *samplers]

    def real(self) -> Part:
        """Real faces beside other real faces: as close as samples can come."""
        counts = {"shape": self.shape, "samples": self.study.samples, "real_images": self.study.real_images}
        dividers = self.study.patch_dividers

        def measure() -> tuple[dict[str, Any], list[np.ndarray]]:
            images = self._faces()
            positions = range(self.study.real_images, len(images.indexes))
            other = self._collect("real faces", images, positions)
            figures = {str(N): metrics.as_json(metrics.figures(other, self._reference(), N)) for N in dividers}
            strip = next(iter(images.batches(positions[: self._columns], self._columns)))
            return {"figures": figures}, [pictures.pixels(image) for image in strip]

        return Part("real", "real", {**counts, "patch_dividers": dividers}, measure)

    def run(self, run: Run) -> Part:
        """A run and the samples that all runs are compared by."""
        return self._part(run.name, run, self.study.sampler, self.study.steps, with_memory=True)

    def sampled(self, run: Run, sampler: str, steps: int) -> Part:
        """A run of the reference model and one of the samplers that are compared."""
        return self._part(f"{run.name}-{sampler}-{steps}", run, sampler, steps, with_memory=False)

    def _part(self, name: str, run: Run, sampler: str, steps: int, with_memory: bool) -> Part:
        sections = run.config.to_dict()
        sections["trainer"] = {key: value for key, value in sections["trainer"].items() if key not in WITHOUT_EFFECT}
        counts = {"samples": self.study.samples, "real_images": self.study.real_images}

        def measure() -> tuple[dict[str, Any], list[np.ndarray]]:
            self._train(run)
            folder = self._draw(run, sampler, steps)
            images = image_sets.open_samples(folder, leave_out=sample.GRID_NAME)
            # An earlier study may have drawn more.
            images = replace(images, indexes=image_sets.shuffled(self.study.samples, self.study.samples))
            statistics = self._collect("samples", images, range(self.study.samples))
            figures = metrics.figures(statistics, self._reference(), run.config.model.patch_divider)
            memory = {"memory": self._memory(run.config)} if with_memory else {}
            strip = [np.array(Image.open(folder / f"{seed:06d}.png")) for seed in range(self._columns)]
            return {**memory, "figures": metrics.as_json(figures)}, strip

        return Part(name, run.name, {**sections, "sampler": sampler, "steps": steps, **counts}, measure)

    @contextlib.contextmanager
    def taken(self, part: Part) -> Iterator[bool]:
        """Keep other processes from what a part writes to; False where one of them is at it."""
        with contextlib.ExitStack() as stack:
            with telling_unwritten(self.results):
                taken = stack.enter_context(file_lock(self.locks / part.place, wait=False))
            yield taken

    def kept(self, part: Part) -> dict[str, Any] | None:
        """The result of a part that is done; None where it is not, or was done with other settings."""
        try:
            held = json.loads((self.results / f"{part.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = held["settings"] == json.loads(json.dumps(part.settings)) and self.strip(part).exists()
        return held["result"] if same else None

    def do(self, part: Part) -> dict[str, Any]:
        """Do a part and keep its result."""
        result, images = part.measure()
        with telling_unwritten(self.results):
            self.results.mkdir(parents=True, exist_ok=True)
            pictures.save_png(self.strip(part), np.concatenate(images, axis=1))
            write_json(self.results / f"{part.name}.json", {"settings": part.settings, "result": result})
        return result

    def strip(self, part: Part) -> Path:
        """Where a few of its images lie, side by side."""
        return self.results / f"{part.name}.png"

    @property
    def _columns(self) -> int:
        return max(1, min(MOST_IN_STRIP, self.study.samples, STRIP_PIXELS // self.shape[2]))

    def _train(self, run: Run) -> None:
        """Train a run to its end, from wherever it is."""
        if run.folder.checkpoint(run.config.trainer.train_num_steps).exists():
            return
        run.folder.create()
        with telling_unwritten(run.folder.root):
            run.config.save(run.folder.config)
        train.main(["--config", str(run.folder.config), "--resume", "latest"])

    def _draw(self, run: Run, sampler: str, steps: int) -> Path:
        """Draw the samples that are missing; returns their folder."""
        folder = run.folder.root / "samples" / f"{sampler}-{steps}"
        where = ["--ckpt", run.folder.last_checkpoint, "--out-dir", folder, "--n-samples", self.study.samples]
        how = ["--sampler", sampler, "--steps", steps, "--batch-size", run.config.trainer.train_batch_size]
        sample.main([str(word) for word in (*where, *how)])
        return folder

    def _memory(self, config: Config) -> dict[str, dict[str, int]]:
        """What one image holds at its peak, a patch at a time, in bytes."""
        size = {"batch_size": 1, "patch_batch_size": 1}
        peaks = {
            "training": planner.training_peak(config, **size, precision=self.precision),
            "sampling": planner.sampling_peak(config, **size),
        }
        return {kind: {"activations": peak.activations, "total": peak.total} for kind, peak in peaks.items()}

    def _faces(self) -> ImageSet:
        """Faces of the evaluation seed: first those that samples are compared with, then as many as samples."""
        count = self.study.real_images + self.study.samples
        images, _ = image_sets.open_data(BUILTIN_FACES, self.shape, count, self.results, "stop")
        return images

    def _collect_reference(self) -> ImageStatistics:
        return self._collect("real faces to compare with", self._faces(), range(self.study.real_images))

    def _collect(self, what: str, images: ImageSet, positions: range) -> ImageStatistics:
        collector = Collector(len(positions), start=0, faces=min(self.shape[1:]) >= SMALLEST_READING, extractor=None)
        for batch in _bar(images.batches(positions, BATCH), what, len(positions)):
            collector.add(batch)
        return collector.result()


def _bar(batches: Iterable[Tensor], what: str, count: int) -> Iterable[Tensor]:
    with tqdm(total=count, desc=what, unit="image", leave=False, dynamic_ncols=True) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


@contextlib.contextmanager
def telling_unwritten(folder: Path) -> Iterator[None]:
    """Make one sentence of a file that cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to: {error.strerror or error}.") from None

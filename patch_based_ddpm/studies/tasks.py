"""The tasks of a study: train each run, draw its samples, and measure them beside real faces that no run has seen.

The result of a task lies in results/ of the study's folder: NAME.png, a few of its images, and then NAME.json, with
the settings that led to it. Several processes may share a study: each takes the tasks whose lock is free.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image

from patch_based_ddpm.config import Config
from patch_based_ddpm.data import pictures
from patch_based_ddpm.data.sources import BUILTIN_FACES
from patch_based_ddpm.errors import InputError, explain_os_error
from patch_based_ddpm.evaluation import image_sets, metrics
from patch_based_ddpm.evaluation.image_sets import ImageSet
from patch_based_ddpm.evaluation.metrics import ImageStatistics
from patch_based_ddpm.files import write_json
from patch_based_ddpm.generation.image_folder import GRID_NAME
from patch_based_ddpm.planning import planner
from patch_based_ddpm.studies.config import Run, StudyConfig
from patch_based_ddpm.studies.controls import DEFECTS, control_name, spoil

BATCH = 32  # images that are measured at a time
STRIP_PIXELS = 256  # width of the images beside a result
MOST_IN_STRIP = 8
SECONDS_BETWEEN_LOOKS = 5  # while other processes hold all locks
# Keys of `trainer` that start with one of these do not affect the trained weights.
WITHOUT_EFFECT = ("log_dir", "num_workers", "log_every", "checkpoints_total_limit", "wandb_", "preview_")
Command = Callable[[Sequence[str]], None]


class Task(NamedTuple):
    """A measurement.

    Attributes:
        name: of its files.
        lock: the name of the run, or of the one that it continues; one process at a time may write to their folders.
        settings: JSON data of everything that the result depends on.
        measure: returns the result as JSON data, and the first images, uint8 (H, W, 3) each.
    """

    name: str
    lock: str
    settings: dict[str, Any]
    measure: Callable[[], tuple[dict[str, Any], list[np.ndarray]]]


class Tasks:
    """All tasks of a study.

    Args:
        config: the study.
        precision: of training: "no", "bf16" or "fp16".
        train, sample: the commands, called with their arguments.
    """

    def __init__(self, config: StudyConfig, precision: str, *, train: Command, sample: Command) -> None:
        self.config, self.study = config, config.study
        self.precision = precision
        self.train, self.sample = train, sample
        self.results = config.folder / "results"
        self.shape = (config.model.channels, *config.model.image_shape)
        self.counts = {"samples": self.study.samples, "real_images": self.study.real_images}
        self.columns = max(1, min(MOST_IN_STRIP, self.study.samples, STRIP_PIXELS // self.shape[2]))

    def all(self) -> list[Task]:
        """In the order in which they are done: real faces; every model, seed by seed; the samplers; the controls."""
        by_seed = zip(*map(self.config.runs, self.config.models()), strict=True)
        main, reference = (self.study.sampler, self.study.steps), self.config.runs(self.config.reference)
        models = [self._run(run.name, run, *main) for runs in by_seed for run in runs]
        samplers = [
            self._run(run.sampled_by(*pair), run, *pair) for pair in self.study.sampler_steps for run in reference
        ]
        return [self.real(), *models, *samplers, *map(self.control, DEFECTS)]

    def real(self) -> Task:
        """Real faces beside other real faces: the floor of every figure."""
        dividers = self.study.patch_dividers

        def measure() -> tuple[dict[str, Any], list[np.ndarray]]:
            others = self._faces(slice(self.study.real_images, None))
            statistics = self._collect("real faces", others)
            figures = {str(N): metrics.as_json(metrics.figures(statistics, self._real_faces, N)) for N in dividers}
            strip = next(others.batches(range(self.columns), self.columns))
            return {"figures": figures}, [pictures.pixels(image) for image in strip]

        return Task("real", "real", {"shape": [*self.shape], **self.counts, "patch_dividers": [*dividers]}, measure)

    def control(self, defect: str) -> Task:
        """Real faces with a defect."""
        N = self.config.model.patch_divider

        def measure() -> tuple[dict[str, Any], list[np.ndarray]]:
            others = self._faces(slice(self.study.real_images, None))
            count = len(others.indexes)
            spoiled = spoil(torch.cat(list(others.batches(range(count), BATCH))), defect, N)
            statistics = metrics.collect(spoiled.split(BATCH), range(count), count, label=defect, faces=True)
            figures = metrics.as_json(metrics.figures(statistics, self._real_faces, N))
            return {"figures": figures}, [pictures.pixels(image) for image in spoiled[: self.columns]]

        settings = {"shape": [*self.shape], **self.counts, "defect": defect, "patch_divider": N}
        return Task(control_name(defect), control_name(defect), settings, measure)

    def _run(self, name: str, run: Run, sampler: str, steps: int) -> Task:
        """Train a run, draw its samples with a sampler, and measure them."""
        settings = {**_with_effect(run.config), "sampler": sampler, "steps": steps, **self.counts}

        def measure() -> tuple[dict[str, Any], list[np.ndarray]]:
            folder = self._draw(run, sampler, steps)
            images = image_sets.open_samples(folder, leave_out=GRID_NAME)
            # The folder may hold more images, drawn when study.samples was larger.
            images = replace(images, indexes=image_sets.shuffled(self.study.samples, self.study.samples))
            statistics = self._collect("samples", images)
            figures = metrics.figures(statistics, self._real_faces, run.config.model.patch_divider)
            memory = {"memory": self._memory(run.config)} if name == run.name else {}
            strip = [np.array(Image.open(folder / f"{seed:06d}.png")) for seed in range(self.columns)]
            return {**memory, "figures": metrics.as_json(figures)}, strip

        return Task(name, (run.start or run).name, settings, measure)

    def check_unchanged(self) -> None:
        """Refuse to continue runs that were trained with other settings than the study's.

        Raises:
            InputError: there is such a run.
        """
        for run in (run for model in self.config.models() for run in self.config.runs(model)):
            if not run.folder.config.exists():
                continue
            held = _with_effect(Config.load(run.folder.config))
            for section, wanted in _with_effect(run.config).items():
                for key, value in wanted.items():
                    if held[section][key] != value:
                        raise InputError(
                            f"{run.folder.root} was trained with {section}.{key} {json.dumps(held[section][key])}, but "
                            f"the study says {json.dumps(value)}; choose another trainer.log_dir, or remove that "
                            "folder."
                        )

    def do_all(self) -> dict[str, dict[str, Any]]:
        """Do every task that has no result yet, and return all results by name.

        A task whose lock another process holds is left to that process; its result is read once the lock is free.
        """
        results: dict[str, dict[str, Any]] = {}
        tasks = self.all()
        while len(results) < len(tasks):
            before = len(results)
            for number, task in enumerate(tasks, 1):
                lock = None if task.name in results else self.lock(task.lock, wait=False)
                if lock is not None:
                    with lock:
                        kept = self.kept(task)
                        ending = "" if kept is None else ": done before"
                        print(f"[{number}/{len(tasks)}] {task.name}{ending}", flush=True)
                        results[task.name] = self.do(task) if kept is None else kept
            if len(results) == before:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        return results

    def lock(self, name: str, *, wait: bool) -> AbstractContextManager | None:
        """Keep other processes from the same name until the end of a block; None if one holds it and not `wait`."""
        with explain_os_error(f"{self.results} cannot be written to"), suppress(Timeout):
            return FileLock(self.results / "locks" / name).acquire(blocking=wait)
        return None

    def kept(self, task: Task) -> dict[str, Any] | None:
        """The result of a task; None if there is none, or only one with other settings."""
        try:
            held = json.loads((self.results / f"{task.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return held["result"] if held["settings"] == task.settings and self.strip(task.name).exists() else None

    def do(self, task: Task) -> dict[str, Any]:
        """Do a task and keep its result."""
        result, images = task.measure()
        with explain_os_error(f"{self.results} cannot be written to"):
            self.results.mkdir(parents=True, exist_ok=True)
            pictures.save_png(self.strip(task.name), np.concatenate(images, axis=1))
            write_json(self.results / f"{task.name}.json", {"settings": task.settings, "result": result})
        return result

    def strip(self, name: str) -> Path:
        """The picture of a task's first images, side by side."""
        return self.results / f"{name}.png"

    def _draw(self, run: Run, sampler: str, steps: int) -> Path:
        """Train a run unless it is trained, draw the samples that are missing, and return their folder."""
        self._train(run)
        folder = run.folder.root / "samples" / f"{sampler}-{steps}"
        where = ["--ckpt", run.folder.last_checkpoint, "--out-dir", folder, "--n-samples", self.study.samples]
        how = ["--sampler", sampler, "--steps", steps, "--batch-size", run.config.trainer.train_batch_size]
        self.sample([str(word) for word in (*where, *how)])
        return folder

    def _train(self, run: Run) -> None:
        """Train a run unless it is trained, and before it the one that it continues."""
        if run.folder.checkpoint(run.config.trainer.train_num_steps).exists():
            return
        resume = "latest"
        if run.start is not None and not run.folder.steps():
            self._train(run.start)
            resume = str(run.start.folder.checkpoint(run.start.config.trainer.train_num_steps))
        run.folder.create()
        with explain_os_error(f"{run.folder.config} cannot be written"):
            run.config.save(run.folder.config)
        self.train(["--config", str(run.folder.config), "--resume", resume])

    def _memory(self, config: Config) -> dict[str, dict[str, int]]:
        """The planned peak for one image, one patch per pass, in bytes."""
        size = {"batch_size": 1, "patch_batch_size": 1}
        training = planner.training_peak(config, **size, precision=self.precision)
        peaks = {"training": training, "sampling": planner.sampling_peak(config, **size)}
        return {kind: {"activations": peak.activations, "total": peak.total} for kind, peak in peaks.items()}

    def _faces(self, part: slice) -> ImageSet:
        """Faces that no run is trained on: first `real_images` to compare samples with, then as many as samples."""
        count = self.study.real_images + self.study.samples
        faces = image_sets.open_data(BUILTIN_FACES, self.shape, count, self.results, "stop")
        return replace(faces, indexes=faces.indexes[part])

    @cached_property
    def _real_faces(self) -> ImageStatistics:
        return self._collect("real faces to compare with", self._faces(slice(self.study.real_images)))

    def _collect(self, label: str, images: ImageSet) -> ImageStatistics:
        share = range(len(images.indexes))  # the whole set
        return metrics.collect(images.batches(share, BATCH), share, len(share), label=label, faces=True)


def _with_effect(config: Config) -> dict[str, dict[str, Any]]:
    """The settings that affect the trained weights, by section."""
    return {
        section: {key: value for key, value in settings.items() if not key.startswith(WITHOUT_EFFECT)}
        for section, settings in config.to_dict().items()
    }

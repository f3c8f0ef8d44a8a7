"""Compare models and samplers, from training to tables: `python -m patch_based_ddpm.study --config FILE`.

What is done is kept, so that the same command goes on where it was cut off, and so that the command started more than
once shares the work: each process does what no other one is at.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patch_based_ddpm import command_line, train
from patch_based_ddpm.data import pictures
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation import metrics
from patch_based_ddpm.file_lock import file_lock
from patch_based_ddpm.files import atomic_write, write_json
from patch_based_ddpm.studies.config import Run, StudyConfig
from patch_based_ddpm.studies.plot import save_plot
from patch_based_ddpm.studies.report import markdown
from patch_based_ddpm.studies.tasks import Part, Parts, check_unchanged, telling_unwritten

MEMORY = "bytes of live tensors at their peak, one image and one patch a pass, planned as by patch_based_ddpm.memory"
SECONDS_BETWEEN_LOOKS = 5  # at what other processes are doing
ENLARGED = 3  # pixels of a side that show one, in the grids


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or with the process's own."""
    parser = command_line.Parser(
        prog="patch_based_ddpm.study", description="Train models that differ in one thing, and compare their samples."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON configuration of a study")
    config = StudyConfig.load(parser.parse_args(argv).config)
    accelerator = train.start_accelerator(config.trainer)
    if accelerator.num_processes > 1:
        raise InputError(f"a study runs in one process, not in {accelerator.num_processes}; start it with python -m.")
    for model in config.models():
        for run in config.runs(model):
            check_unchanged(run)
    parts = Parts(config, accelerator.mixed_precision)
    report = _report(config, parts, _results(parts))
    with telling_unwritten(config.folder), file_lock(parts.locks / "report", wait=True):
        _write(config, parts, report)


def _results(parts: Parts) -> dict[str, dict[str, Any]]:
    """Do what is not done yet; what another process is at, it leaves to that one and takes the result."""
    results = {}
    waiting = dict(enumerate(parts.all(), 1))
    count = len(waiting)
    while waiting:
        before = len(waiting)
        for number, part in list(waiting.items()):
            with parts.taken(part) as mine:
                if not mine:
                    continue
                kept = parts.kept(part)
                print(f"[{number}/{count}] {part.name}{'' if kept is None else ': done before'}", flush=True)
                results[part.name] = parts.do(part) if kept is None else kept
            del waiting[number]
        if len(waiting) == before:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return results


def _report(config: StudyConfig, parts: Parts, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of study.json."""
    models = [
        {
            "name": model.name,
            "patch_divider": model.config.model.patch_divider,
            "halo": model.config.model.halo,
            "position_conditioning": model.config.model.position_conditioning,
            "global_content_conditioning": model.config.model.global_content_conditioning,
            "runs": [_run(run, results[parts.run(run).name]) for run in config.runs(model)],
        }
        for model in config.models()
    ]
    reference = config.reference()
    samplers = [
        {
            "sampler": sampler,
            "steps": steps,
            "runs": [_run(run, results[parts.sampled(run, sampler, steps).name]) for run in config.runs(reference)],
        }
        for sampler, steps in config.study.sampler_steps
    ]
    return {
        "config": config.to_dict(),
        "real": results[parts.real().name],
        "models": models,
        "samplers": {"model": reference.name, "rows": samplers},
        "definitions": {**metrics.DEFINITIONS, "memory": MEMORY},
    }


def _run(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    return {"seed": run.config.trainer.seed, **result}


def _write(config: StudyConfig, parts: Parts, report: dict[str, Any]) -> None:
    write_json(config.folder / "study.json", report)
    real = parts.real()
    _save_grid(config.folder / "models.png", parts, [real, *(parts.run(config.runs(it)[0]) for it in config.models())])
    run = config.runs(config.reference())[0]
    if samplers := [parts.sampled(run, *pair) for pair in config.study.sampler_steps]:
        _save_grid(config.folder / "samplers.png", parts, [real, *samplers])
    picture = config.folder / "study.png"
    if command_line.can_plot(picture):
        save_plot(report, picture)
    text = markdown(report)
    with atomic_write(config.folder / "tables.md") as file:
        file.write(text.encode())
    print(f"{text}\nThese tables are in {config.folder / 'tables.md'}, all figures in {config.folder / 'study.json'}.")


def _save_grid(path: Path, parts: Parts, rows: Sequence[Part]) -> None:
    grid = pictures.tile([np.array(Image.open(parts.strip(row))) for row in rows], columns=1)
    pictures.save_png(path, pictures.enlarge(grid, ENLARGED))


if __name__ == "__main__":
    command_line.run(main)

"""Compare models and samplers, from training to tables: `python -m patch_based_ddpm.study --config FILE`.

The same command continues an interrupted study; processes that are started with it at once share the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patch_based_ddpm import command_line, sample, train
from patch_based_ddpm.data import pictures
from patch_based_ddpm.errors import InputError, explain_os_error
from patch_based_ddpm.files import atomic_write, write_json
from patch_based_ddpm.studies import report
from patch_based_ddpm.studies.config import StudyConfig
from patch_based_ddpm.studies.controls import DEFECTS, control_name
from patch_based_ddpm.studies.plot import save_plot
from patch_based_ddpm.studies.tasks import Tasks

SCALE = 3  # screen pixels for each image pixel, across and down, in the grids


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
    tasks = Tasks(config, accelerator.mixed_precision, train=train.main, sample=sample.main)
    tasks.check_unchanged()
    content = report.build(config, tasks.do_all())
    with tasks.lock("report", wait=True), explain_os_error(f"{config.folder} cannot be written to"):
        _write(config, tasks, content)


def _write(config: StudyConfig, tasks: Tasks, content: dict[str, Any]) -> None:
    folder = config.folder
    write_json(folder / "study.json", content)
    first_runs = [config.runs(model)[0].name for model in config.models()]
    _save_grid(folder / "models.png", map(tasks.strip, ["real", *first_runs]))
    if pairs := config.study.sampler_steps:
        run = config.runs(config.reference)[0]
        _save_grid(folder / "samplers.png", map(tasks.strip, ["real", *(run.sampled_by(*pair) for pair in pairs)]))
    _save_grid(folder / "controls.png", map(tasks.strip, ["real", *map(control_name, DEFECTS)]))
    if command_line.can_plot(folder / "study.png"):
        save_plot(content, folder / "study.png")
    text = report.markdown(content)
    with atomic_write(folder / "tables.md") as file:
        file.write(text.encode())
    print(f"{text}\nThese tables are in {folder / 'tables.md'}, all figures in {folder / 'study.json'}.")


def _save_grid(path: Path, rows: Iterable[Path]) -> None:
    grid = pictures.tile([np.array(Image.open(row)) for row in rows], columns=1)
    pictures.save_png(path, pictures.enlarge(grid, SCALE))


if __name__ == "__main__":
    command_line.run(main)

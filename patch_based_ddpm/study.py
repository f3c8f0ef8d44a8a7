"""Compare models and samplers, from training to tables: `python -m patch_based_ddpm.study --config FILE`.

What is done is kept, so that the same command goes on where it was cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from patch_based_ddpm import command_line, metrics, pictures, train
from patch_based_ddpm.atomic_write import atomic_write, write_json
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.study_config import StudyConfig
from patch_based_ddpm.study_parts import Part, Parts, check_unchanged, telling_unwritten
from patch_based_ddpm.study_plot import save_plot
from patch_based_ddpm.study_report import markdown

MEMORY = "bytes of live tensors at their peak, one image and one patch a pass, planned as by patch_based_ddpm.memory"


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
    with telling_unwritten(config.folder):
        _write(config, parts, report)


def _results(parts: Parts) -> dict[str, dict[str, Any]]:
    """Do what is not done yet."""
    results = {}
    listed = parts.all()
    for number, part in enumerate(listed, 1):
        kept = parts.kept(part)
        print(f"[{number}/{len(listed)}] {part.name}{'' if kept is None else ': done before'}", flush=True)
        results[part.name] = parts.do(part) if kept is None else kept
    return results


def _report(config: StudyConfig, parts: Parts, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of study.json."""
    models = [
        {
            "name": model.name,
            "patch_divider": model.config.model.patch_divider,
            "position_conditioning": model.config.model.position_conditioning,
            "global_content_conditioning": model.config.model.global_content_conditioning,
            "runs": [{"seed": run.config.trainer.seed, **results[parts.run(run).name]} for run in config.runs(model)],
        }
        for model in config.models()
    ]
    samplers = [
        {"sampler": sampler, "steps": steps, **results[parts.sampled(sampler, steps).name]}
        for sampler, steps in config.study.sampler_steps
    ]
    return {
        "config": config.to_dict(),
        "real": results[parts.real().name],
        "models": models,
        "samplers": {"run": config.reference().name, "rows": samplers},
        "definitions": {**metrics.DEFINITIONS, "memory": MEMORY},
    }


def _write(config: StudyConfig, parts: Parts, report: dict[str, Any]) -> None:
    write_json(config.folder / "study.json", report)
    rows = [parts.real(), *(parts.run(config.runs(model)[0]) for model in config.models())]
    pictures.save_png(config.folder / "grids.png", pictures.tile([_strip(parts, row) for row in rows], columns=1))
    picture = config.folder / "study.png"
    if command_line.can_plot(picture):
        save_plot(report, picture)
    text = markdown(report)
    with atomic_write(config.folder / "tables.md") as file:
        file.write(text.encode())
    print(f"{text}\nThese tables are in {config.folder / 'tables.md'}, all figures in {config.folder / 'study.json'}.")


def _strip(parts: Parts, part: Part) -> np.ndarray:
    return np.array(Image.open(parts.strip(part)))


if __name__ == "__main__":
    command_line.run(main)

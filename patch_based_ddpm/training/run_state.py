"""What a checkpoint of a run holds: taken from a trainer, and put back so that the run goes on as if never ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from patch_based_ddpm import checkpoint
from patch_based_ddpm.checkpoint import published
from patch_based_ddpm.config import Config
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.training.metrics import Skips, Window, own_rows

if TYPE_CHECKING:
    from patch_based_ddpm.training.trainer import Trainer


def collect(trainer: Trainer) -> Callable[[], dict[str, Any]]:
    """Gather what the other processes know; called by all of them together.

    Returns:
        A function that makes the contents of the checkpoint, for one process to call.
    """
    bad_images = trainer.all_bad_images()
    rows = trainer.window.rows
    window = None if rows is None else trainer.accelerator.gather(rows[None])  # (processes, n, 3 + N*N)
    scaler = trainer.accelerator.scaler
    return lambda: {
        "config": trainer.whole_config.to_dict(),
        "step": trainer.step,
        "model": trainer.unet.state_dict(),
        "ema": trainer.ema.ema_model.state_dict(),
        "optimizer": trainer.training_step.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "skipped_steps": trainer.skips.figures()[0],
        "bad_images": bad_images,
        "window": window,
    }


def restore(trainer: Trainer, contents: dict[str, Any], path: checkpoint.PathLike) -> None:
    """Put everything back.

    Args:
        trainer: a fresh one.
        contents: what `checkpoint.read` returned.
        path: where that was, for messages.

    Raises:
        InputError: it does not fit the config, or holds weights alone.
    """
    if not contents["published"]:
        _check_same_model(trainer.whole_config, contents["config"], path)
    optimizer = contents["optimizer"]
    if type(contents["step"]) is not int or not isinstance(optimizer, dict) or "param_groups" not in optimizer:
        raise InputError(f"{path}: holds no step and optimizer state; it can be sampled from, but not continued.")
    checkpoint.load_weights(trainer.unet, contents["model"], f"{path} (model)")
    checkpoint.load_weights(trainer.ema.ema_model, contents["ema"], f"{path} (ema)")
    if contents["published"]:
        names = [name for name, _ in trainer.unet.named_parameters()]
        optimizer = published.translate_optimizer(optimizer, contents["published_model"], names)
    trainer.training_step.load_optimizer(optimizer)
    accelerator = trainer.accelerator
    if contents["scaler"] is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(contents["scaler"])
    trainer.step = contents["step"]
    trainer.skips = Skips(contents.get("skipped_steps", 0), accelerator.device)
    trainer.bad_images = set(contents.get("bad_images", ()))
    rows = contents.get("window")
    trainer.window = Window(own_rows(rows, accelerator.process_index, accelerator.num_processes, accelerator.device))
    wanted, saved = trainer.whole_config.model.halo, 0 if contents["published"] else contents["config"].model.halo
    if wanted != saved:
        accelerator.print(f"{path}: was trained with a halo of {saved} pixels; going on with one of {wanted}.")


def _check_same_model(wanted: Config, saved: Config, path: checkpoint.PathLike) -> None:
    """Weights may fit and still mean something else, for example another objective. Another halo is soon learnt."""
    for section in ("model", "diffusion"):
        ours, theirs = getattr(wanted, section), getattr(saved, section)
        for field in dataclasses.fields(ours):
            expected, found = getattr(ours, field.name), getattr(theirs, field.name)
            if expected != found and field.name != "halo":
                raise InputError(
                    f"{path}: was trained with {section}.{field.name} {found}, but the configuration says {expected}."
                )

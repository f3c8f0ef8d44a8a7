"""What a checkpoint of a run holds: taken from a trainer, and put back so that the run goes on as if never ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from patch_based_ddpm import checkpoint
from patch_based_ddpm.checkpoint import published
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
        # A network trained with another halo soon adapts.
        checkpoint.check_same_model(path, contents["config"], trainer.whole_config, but="halo")
    optimizer = contents["optimizer"]
    if type(contents["step"]) is not int or not isinstance(optimizer, dict) or "param_groups" not in optimizer:
        raise InputError(f"{path}: holds no step and optimizer state; it can be sampled from, but not continued.")
    checkpoint.load_weights(trainer.unet, contents["model"], f"{path} (model)")
    checkpoint.load_weights(trainer.ema.ema_model, contents["ema"], f"{path} (ema)")
    trainer.training_step.load_optimizer(_fitting_optimizer(trainer, contents, path))
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


def _fitting_optimizer(trainer: Trainer, contents: dict[str, Any], path: checkpoint.PathLike) -> dict[str, Any]:
    """The optimizer state of a checkpoint; Adam itself compares no shapes."""
    optimizer, parameters = contents["optimizer"], dict(trainer.unet.named_parameters())
    try:
        if contents["published"]:
            optimizer = published.translate_optimizer(optimizer, contents["published_model"], list(parameters))
        (group,) = optimizer["param_groups"]
        shapes = [parameter.shape for parameter in parameters.values()]
        fits = len(group["params"]) == len(shapes) and all(
            moments[key].shape == shapes[number]
            for number, moments in optimizer["state"].items()
            for key in ("exp_avg", "exp_avg_sq")
        )
    except (LookupError, TypeError, ValueError, AttributeError):  # of a malformed state
        fits = False
    if not fits:
        raise InputError(
            f"{path}: the optimizer state does not fit the configuration's model; it must be Adam's, for "
            f"{len(parameters)} parameters of the same shapes."
        )
    return optimizer

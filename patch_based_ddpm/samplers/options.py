"""The samplers' names and options: which go together, and what holds where none is given."""

from __future__ import annotations

from typing import Any

from patch_based_ddpm.errors import InputError

SAMPLERS = ("ddpm", "ddim", "dpm-solver++")
ORDERS = (1, 2, 3)  # of dpm-solver++
SHORT = 20  # steps of dpm-solver++; the others visit all timesteps


def check(sampler: str, *, eta: float, order: int | None) -> None:
    """Refuse options that do not go together.

    Args:
        sampler: see `samplers.draw`.
        eta: see `samplers.draw`.
        order: see `samplers.draw`.

    Raises:
        InputError: there is no such sampler, or it cannot take these options.
    """
    if sampler not in SAMPLERS:
        raise InputError(f'the sampler is "{sampler}"; it must be one of {", ".join(SAMPLERS)}.')
    if sampler == "ddpm" and eta != 0:
        raise InputError(f"eta is {eta}, but ddpm always draws all its noise; eta goes with ddim and dpm-solver++.")
    if sampler != "dpm-solver++":
        if order is not None:
            raise InputError(f"order is {order}, but {sampler} has only one; order goes with dpm-solver++.")
        return
    if order is not None and order not in ORDERS:
        raise InputError(f"order is {order}; it must be one of {', '.join(map(str, ORDERS))}.")
    if eta not in (0, 1):
        raise InputError(f"eta is {eta}; for dpm-solver++ it must be 0, deterministic, or 1, with noise.")


def defaults(sampler: str, timesteps: int) -> dict[str, Any]:
    """The steps, spacing and, where there are several, order of a sampler that is given none.

    Args:
        sampler: one of `SAMPLERS`.
        timesteps: T.
    """
    if sampler == "dpm-solver++":
        return {"steps": min(SHORT, timesteps), "order": 2, "spacing": "logsnr"}
    return {"steps": timesteps, "spacing": "trailing"}

"""Shared by all samplers: their options, the coefficients of a step, and the loop over the timesteps.

Symbols: `x_T` pure noise, `x_t` noisy image, `x_0` image, `z` noise, `t` timestep in [0, T), `s` the timestep after it;
`alpha_bar` at the timesteps visited, 1 at the final image. Shapes: `b` images, `c` channels, `H W` image, `S` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.samplers import timesteps

Noise = Callable[[], Tensor]
Progress = Callable[[list[int]], Iterable[int]]
Observe = Callable[[int, Tensor, Tensor], None]

DEFAULT_BLEND = 0.1
SAMPLERS: dict[str, Sampler] = {}  # by name; `samplers/__init__.py` fills it


class Coefficients(NamedTuple):
    """The steps from t to s: x_s = a x_t + sum_k b_k x_0(k steps ago) + c z. The last one returns the latest x_0.

    Attributes:
        x_t: a, (S,).
        x_0: b, (S, order), the latest prediction first; 0 for predictions before the first step.
        noise: c, (S,); None: the sampler draws no noise.
        corrector: (S,) and (S, order); None: the sampler corrects nothing. Once x_0 at t is known, x_t is replaced by
            the same sum, of the corrected x at the step before and of the x_0; not in the first step.
    """

    x_t: Tensor
    x_0: Tensor
    noise: Tensor | None
    corrector: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """A sampler's name and options. None: the sampler's default.

    Attributes:
        name: one of `SAMPLERS`.
        steps: timesteps visited, in [1, T].
        eta: noise added at each step: for "ddim" from 0, none, to 1, as much as "ddpm"; for "dpm-solver++" 0 or 1.
        order: of "dpm-solver++", 1, 2 or 3.
        spacing: of the timesteps, "trailing" or "logsnr", see `timesteps`; the default depends on their number.
        blend: share of the steps, in [0, 1], the last ones, in which the predictions of all grids are blended; for
            models with more than one grid. In the steps before, the grids take turns.
    """

    name: str = "ddpm"
    steps: int | None = None
    eta: float = 0.0
    order: int | None = None
    spacing: str | None = None
    blend: float | None = None

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise InputError(f'the sampler is "{self.name}"; it must be one of {", ".join(SAMPLERS)}.')
        orders = SAMPLERS[self.name].orders
        if self.order is not None and not orders:
            others = ", ".join(sampler.name for sampler in SAMPLERS.values() if sampler.orders)
            raise InputError(f"order is {self.order}, but {self.name} has only one; order goes with {others}.")
        if self.order is not None and self.order not in orders:
            raise InputError(f"order is {self.order}; it must be one of {', '.join(map(str, orders))}.")
        if self.spacing is not None and self.spacing not in timesteps.SPACINGS:
            raise InputError(f'the spacing is "{self.spacing}"; it must be one of {", ".join(timesteps.SPACINGS)}.')
        if self.blend is not None and not 0 <= self.blend <= 1:
            raise InputError(f"blend is {self.blend}; it must lie in [0, 1].")
        SAMPLERS[self.name].check(self)

    def grids(self, step: int, grids: int) -> Sequence[int]:
        """The grids that a step predicts with, counted from 0, of a model with some grids; for resolved options."""
        blended = math.ceil(round(self.steps * (self.blend or 0), 6))
        return range(grids) if step >= self.steps - blended else (step % grids,)

    def resolve(self, T: int, grids: int = 1) -> SamplerConfig:
        """Fill in the defaults for a model of T timesteps; an `InputError` if the options do not go with it.

        Third order with noise becomes second in few steps, see `Sampler.fewest_noisy_third_order_steps`.
        """
        sampler = SAMPLERS[self.name]
        steps = min(T, sampler.default_steps or T) if self.steps is None else self.steps
        if not 1 <= steps <= T:
            raise InputError(
                f"the number of sampling steps is {steps}; it must lie in [1, {T}], the model's timesteps."
            )
        fewest_logsnr = sampler.fewest_logsnr_steps
        spacing = "trailing" if fewest_logsnr is None or steps < fewest_logsnr else "logsnr"
        order = sampler.default_order if self.order is None else self.order
        if (order, self.eta) == (3, 1) and steps < sampler.fewest_noisy_third_order_steps:
            order = 2
        if self.blend is not None and grids == 1:
            raise InputError(f"blend is {self.blend}; it goes with models of several grids, and this one has 1.")
        blend = DEFAULT_BLEND if self.blend is None and grids > 1 else self.blend
        return replace(self, steps=steps, order=order, spacing=self.spacing or spacing, blend=blend)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Turns noise into images with a diffusion model, over some or all of its timesteps.

    Attributes:
        name: in `SAMPLERS`, configurations and flags.
        coefficients: computes them from alpha_bar, (S,) float64 at the timesteps visited, and the resolved options.
        check: raises an InputError if the sampler does not take the options.
        default_steps: at most T are taken; None: all timesteps.
        orders: the choice; empty if there is none.
        default_order: one of `orders`, or None.
        fewest_logsnr_steps: from this number of steps on, the default spacing is "logsnr"; None: always "trailing".
        fewest_noisy_third_order_steps: in fewer, order 3 with eta 1 is replaced by order 2.
    """

    name: str
    coefficients: Callable[[Tensor, SamplerConfig], Coefficients]
    check: Callable[[SamplerConfig], None]
    default_steps: int | None = None
    orders: tuple[int, ...] = ()
    default_order: int | None = None
    fewest_logsnr_steps: int | None = None
    fewest_noisy_third_order_steps: int = 0

    @torch.no_grad()
    def __call__(
        self,
        diffusion: GaussianDiffusion,
        x_T: Tensor,
        *,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
        patch_batch_size: int | None = None,
        progress: Progress = iter,
        observe: Observe | None = None,
        **options: Any,
    ) -> Tensor:
        """Denoise x_T without recording gradients.

        Args:
            diffusion: the model.
            x_T: (b, c, H, W) standard normal.
            noise: draws each z, (b, c, H, W) standard normal; the last step has none.
            generator: draws z if there is no `noise`; None: PyTorch's global one.
            patch_batch_size: patches per forward pass, counted over all images; None: all.
            progress: wraps the list of timesteps, to show a progress bar.
            observe: is called with (t, x_t, predicted x_0) at every timestep visited.
            options: `steps`, `eta`, `order`, `spacing`, `blend`, see `SamplerConfig`.

        Returns:
            x_0, (b, c, H, W) in [-1, 1].

        Raises:
            InputError: the sampler does not take these options, or x_T or z has another shape.
        """
        config = SamplerConfig(name=self.name, **options).resolve(diffusion.timesteps, diffusion.grids)
        if x_T.shape[1:] != diffusion.image_shape:
            wanted = ", ".join(map(str, diffusion.image_shape))
            raise InputError(f"x_T has the shape {tuple(x_T.shape)}; for this model it must be (b, {wanted}).")
        alpha_bar = diffusion.exact_alpha_bar
        visited = timesteps.SPACINGS[config.spacing](alpha_bar, config.steps)
        # In half precision, the error of the coefficients adds up to as much as 0.1 over 1000 steps.
        x_t = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
        a, b, c, corrector = self.coefficients(alpha_bar[visited], config)
        a, b, c = (None if each is None else each.to(x_t) for each in (a, b, c))
        corrector = None if corrector is None else [each.to(x_t) for each in corrector]
        x_0s: list[Tensor] = []  # the latest first
        corrected = x_t
        for i, step in enumerate(progress(visited)):
            t = torch.full(x_t.shape[:1], step, device=x_t.device, dtype=torch.int64)
            x_0s = [diffusion.predict_x_0(x_t, t, patch_batch_size, config.grids(i, diffusion.grids)), *x_0s]
            if observe is not None:
                observe(step, x_t, x_0s[0])
            if corrector is not None:
                if i > 0:
                    x_t = _combine(corrector[0][i], corrected, corrector[1][i], x_0s)
                corrected = x_t
            x_t = _combine(a[i], x_t, b[i], x_0s)
            if c is not None and i + 1 < len(visited):
                x_t = x_t + c[i] * _draw_noise(x_t, noise, generator)
            x_0s = x_0s[: b.shape[1] - 1]
        return x_t


def _combine(a: Tensor, x: Tensor, b: Tensor, x_0s: list[Tensor]) -> Tensor:
    """a x + sum_k b_k x_0(k steps ago)."""
    return a * x + reduce(add, (weight * x_0 for weight, x_0 in zip(b, x_0s)))


def _draw_noise(x_t: Tensor, noise: Noise | None, generator: torch.Generator | None) -> Tensor:
    if noise is None:
        device = x_t.device if generator is None else generator.device
        return torch.randn(x_t.shape, generator=generator, device=device, dtype=x_t.dtype).to(x_t.device)
    z = noise()
    if z.shape != x_t.shape:
        raise InputError(f"noise() has the shape {tuple(z.shape)}; it must be that of x_T, {tuple(x_t.shape)}.")
    return z


def following(alpha_bar: Tensor) -> Tensor:
    """alpha_bar at s, (S,): at the timestep visited next, and 1 after the last."""
    return torch.cat([alpha_bar[1:], torch.ones_like(alpha_bar[:1])])

"""The configuration of a study: that of a training run, and a section `study` that lists what to compare.

Runs differ in N, the halo, the conditioning and the seed, and in nothing else.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, StrictInt

from patch_based_ddpm.config import Config, DiffusionConfig, ModelConfig, TrainerConfig
from patch_based_ddpm.data.sources import BUILTIN_FACES
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation import sliced_wasserstein
from patch_based_ddpm.samplers import SamplerConfig
from patch_based_ddpm.strict_json import ConfigFile, Positive, Seed, Text, key, section
from patch_based_ddpm.training.run_folder import RunFolder

MOST_SAMPLES = 10**6  # their seeds then have six digits, so that files sorted by name are sorted by seed
ABLATIONS = {
    "no-position": {"position_conditioning": False},
    "no-content": {"global_content_conditioning": False},
    "neither": {"position_conditioning": False, "global_content_conditioning": False},
}


@section("study")
class StudySection:
    """The models and samplers to compare, and the number of images."""

    patch_dividers: tuple[Positive, ...] = key(
        ..., "N of the models to compare; must include `model.patch_divider`.", min_length=1
    )
    halos: tuple[Positive, ...] = key((), "Halos of further models, with `model.patch_divider` as N.")
    seeds: tuple[Seed, ...] = key(..., "Seeds; every model is trained once with each.", min_length=1)
    samples: Annotated[StrictInt, Field(ge=2, le=MOST_SAMPLES)] = key(..., "Images drawn from each trained model.")
    real_images: Annotated[StrictInt, Field(ge=2)] = key(
        ..., "Real images that the samples are compared with; they are not in the training set."
    )
    sampler: Text = key(..., "Sampler in the comparison of models, one of those of `sample --sampler`.")
    steps: Positive = key(..., "Sampling steps in the comparison of models.")
    ddpm_steps: tuple[Positive, ...] = key((), "Steps of `ddpm` in the comparison of samplers.")
    ddim_steps: tuple[Positive, ...] = key((), "Steps of `ddim` in the comparison of samplers.")
    dpm_solver_pp_steps: tuple[Positive, ...] = key((), "Steps of `dpm-solver++` in the comparison of samplers.")

    @property
    def sampler_steps(self) -> list[tuple[str, int]]:
        """Sampler and steps of each line in the comparison of samplers."""
        listed = {"ddpm": self.ddpm_steps, "ddim": self.ddim_steps, "dpm-solver++": self.dpm_solver_pp_steps}
        return [(sampler, steps) for sampler, some in listed.items() for steps in some]


class Run(NamedTuple):
    """One model trained with one seed; `name` is that of its folder in the study's folder."""

    name: str
    config: Config

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.trainer.log_dir))

    def sampled_by(self, sampler: str, steps: int) -> str:
        """The name of this run's result in the comparison of samplers."""
        return f"{self.name}-{sampler}-{steps}"


@section("")
class StudyConfig(ConfigFile):
    """A whole study: `StudyConfig.load(path)` reads one."""

    trainer: TrainerConfig
    model: ModelConfig
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
    study: StudySection

    def __post_init__(self) -> None:
        study, N = self.study, self.model.patch_divider
        if self.trainer.train_dataset_dir != BUILTIN_FACES or self.model.channels != 3:
            raise InputError(
                f'trainer.train_dataset_dir is "{self.trainer.train_dataset_dir}" and model.channels '
                f'{self.model.channels}; a study needs "{BUILTIN_FACES}" in 3 channels.'
            )
        for listed in dataclasses.fields(study):
            values = getattr(study, listed.name)
            if isinstance(values, tuple) and len(set(values)) < len(values):
                raise InputError(f"study.{listed.name} is {list(values)}; it must name each value once.")
        if N == 1 or N not in study.patch_dividers:
            raise InputError(
                f"model.patch_divider is {N}; it must be more than 1 and one of study.patch_dividers, "
                f"{list(study.patch_dividers)}, because models with a halo or without conditioning use it."
            )
        for sampler, steps in ((study.sampler, study.steps), *study.sampler_steps):
            try:
                SamplerConfig(name=sampler, steps=steps).resolve(self.diffusion.timesteps)
            except InputError as error:
                raise InputError(f"section study: {error}") from None
        sliced_wasserstein.check_size(*self.model.image_shape)
        self.models()  # builds, and thereby checks, the configuration of each

    @property
    def folder(self) -> Path:
        return Path(self.trainer.log_dir)

    @property
    def reference(self) -> str:
        """The name of the model that draws in the comparison of samplers: as in the paper, N as in section `model`."""
        return f"N{self.model.patch_divider}"

    def models(self) -> dict[str, Config]:
        """The models by name, in the order of the table: one for each N, then those with a halo, then the ablations."""
        N = self.model.patch_divider
        differences = {f"N{divider}": {"patch_divider": divider} for divider in self.study.patch_dividers}
        differences |= {f"N{N}-halo{halo}": {"halo": halo} for halo in self.study.halos}
        differences |= {f"N{N}-{name}": conditioning for name, conditioning in ABLATIONS.items()}
        paper = {"halo": 0, "position_conditioning": True, "global_content_conditioning": True}
        models = {name: dataclasses.replace(self.model, **{**paper, **given}) for name, given in differences.items()}
        sections = {"trainer": self.trainer, "diffusion": self.diffusion}
        return {name: Config(model=model, **sections) for name, model in models.items()}

    def runs(self, model: str) -> list[Run]:
        """A model's runs, one for each seed."""
        runs = []
        for seed in self.study.seeds:
            name = f"{model}-seed{seed}"
            trainer = dataclasses.replace(self.trainer, log_dir=str(self.folder / name), seed=seed)
            runs.append(Run(name, dataclasses.replace(self.models()[model], trainer=trainer)))
        return runs

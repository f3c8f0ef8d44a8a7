"""The configuration of a study: that of a training run, and a section `study` that lists what to compare.

Runs differ in keys of the section `model`, in the seed, and in whether they continue another run.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, StrictBool, StrictInt, StringConstraints

from patch_based_ddpm.config import Config, DiffusionConfig, ModelConfig, TrainerConfig
from patch_based_ddpm.data.sources import BUILTIN_FACES
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation import sliced_wasserstein
from patch_based_ddpm.samplers import SamplerConfig
from patch_based_ddpm.strict_json import ConfigFile, NonNegative, Positive, Seed, Text, key, section
from patch_based_ddpm.training.run_folder import RunFolder

MOST_SAMPLES = 10**6  # their seeds then have six digits, so that files sorted by name are sorted by seed
ABLATIONS = {
    "no-position": {"position_conditioning": False},
    "no-content": {"global_content_conditioning": False},
    "neither": {"position_conditioning": False, "global_content_conditioning": False},
}
# Keys of `model` in which the models of a study differ beside N, as in the paper.
PAPER = {"halo": 0, "grids": 1, "position_conditioning": True, "global_content_conditioning": True}

Name = Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


@section("study")
class StudySection:
    """The models and samplers to compare, and the number of images."""

    patch_dividers: tuple[Positive, ...] = key(
        ..., "N of the models to compare; must include `model.patch_divider`.", min_length=1
    )
    halos: tuple[Positive, ...] = key((), "Halos of further models, with `model.patch_divider` as N.")
    variants: dict[Name, dict[str, Any]] = key(
        {},
        "Further models with `model.patch_divider` as N, by name: the keys of `model` in which each differs, such as "
        '`{"grids2": {"grids": 2}}`.',
    )
    ablations: StrictBool = key(True, "Include models without position conditioning, global content or both.")
    continued_steps: NonNegative = key(
        0,
        "If more than 0, further models: that of `model.patch_divider`, continued by so many steps as it is and as "
        "each of `variants`.",
    )
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
    unipc_steps: tuple[Positive, ...] = key((), "Steps of `unipc` in the comparison of samplers.")
    sampler_model: Text | None = key(
        None, "Name of the model in the comparison of samplers. null: that of `model.patch_divider`."
    )

    @property
    def sampler_steps(self) -> list[tuple[str, int]]:
        """Sampler and steps of each line in the comparison of samplers."""
        listed = {"ddpm": self.ddpm_steps, "ddim": self.ddim_steps, "dpm-solver++": self.dpm_solver_pp_steps}
        listed |= {"unipc": self.unipc_steps}
        return [(sampler, steps) for sampler, some in listed.items() for steps in some]


class Run(NamedTuple):
    """One model trained with one seed.

    Attributes:
        name: of its folder in the study's folder.
        config: of its training.
        start: the run whose last checkpoint it continues, if it does.
    """

    name: str
    config: Config
    start: Run | None = None

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
        models = self.models()  # builds, and thereby checks, the configuration of each
        if self.reference not in models:
            raise InputError(
                f"study.sampler_model is {json.dumps(self.reference)}; it must be one of {', '.join(models)}."
            )

    @property
    def folder(self) -> Path:
        return Path(self.trainer.log_dir)

    @property
    def reference(self) -> str:
        """The name of the model that draws in the comparison of samplers."""
        return self.study.sampler_model or self.plain

    @property
    def plain(self) -> str:
        """The name of the model as in the paper, with N as in section `model`."""
        return f"N{self.model.patch_divider}"

    def models(self) -> dict[str, Config]:
        """The models by name, in the order of the table.

        One for each N, then those with a halo, the variants, the ablations, and the ones that continue another.
        """
        study, plain = self.study, self.plain
        N = {"patch_divider": self.model.patch_divider}
        differences = {f"N{divider}": {"patch_divider": divider} for divider in study.patch_dividers}
        differences |= {f"{plain}-halo{halo}": N | {"halo": halo} for halo in study.halos}
        differences |= {f"{plain}-{name}": N | given for name, given in study.variants.items()}
        if study.ablations:
            differences |= {f"{plain}-{name}": N | conditioning for name, conditioning in ABLATIONS.items()}
        if study.continued_steps:
            continued = f"{plain}+{study.continued_steps}"
            differences |= {continued: N} | {f"{continued}-{name}": N | given for name, given in study.variants.items()}
        models = {name: self._model(given) for name, given in differences.items()}
        steps = {name: self.trainer.train_num_steps + ("+" in name) * study.continued_steps for name in models}
        return {
            name: Config(
                trainer=dataclasses.replace(self.trainer, train_num_steps=steps[name]),
                model=model,
                diffusion=self.diffusion,
            )
            for name, model in models.items()
        }

    def _model(self, given: dict[str, Any]) -> ModelConfig:
        """The section `model` of a model that differs in the given keys from that of the paper."""
        try:
            return dataclasses.replace(self.model, **{**PAPER, **given})
        except InputError as error:
            raise InputError(f"section study: {error}") from None

    def runs(self, model: str) -> list[Run]:
        """A model's runs, one for each seed."""
        config, runs = self.models()[model], []
        starts = self.runs(self.plain) if "+" in model else [None] * len(self.study.seeds)
        for seed, start in zip(self.study.seeds, starts, strict=True):
            name = f"{model}-seed{seed}"
            trainer = dataclasses.replace(config.trainer, log_dir=str(self.folder / name), seed=seed)
            runs.append(Run(name, dataclasses.replace(config, trainer=trainer), start))
        return runs

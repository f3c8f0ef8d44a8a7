"""The configuration of a study: that of a training run, and a section `study` that says what to compare.

Every model is trained on the same images with the same settings; of `trainer` and `model` only the folder, the seed, N
the halo and the conditioning change from one to the next.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_based_ddpm import strict_json
from patch_based_ddpm.config import Config, DiffusionConfig, ModelConfig, TrainerConfig
from patch_based_ddpm.data.sources import BUILTIN_FACES
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation import sliced_wasserstein
from patch_based_ddpm.samplers import SAMPLERS, SamplerConfig
from patch_based_ddpm.strict_json import field, required
from patch_based_ddpm.training.run_folder import RunFolder

MOST_SAMPLES = 10**6  # file names of one length, so that their order is that of the seeds
ABLATIONS = {  # name: position conditioning, global content conditioning
    "no-position": (False, True),
    "no-content": (True, False),
    "neither": (False, False),
}


@dataclass(frozen=True, kw_only=True)
class StudySection:
    """What is compared, and on how many images."""

    patch_dividers: tuple[int, ...] = required("N of the models; `model.patch_divider` of the ablations", least=1)
    halos: tuple[int, ...] = field((), "`model.halo` of further models, at `model.patch_divider`", least=1)
    seeds: tuple[int, ...] = required("every model is trained once with each, as `trainer.seed`", least=0, below=2**63)
    samples: int = required("images drawn of each model", least=2, most=MOST_SAMPLES)
    real_images: int = required("images that samples are compared with; no run trains on them", least=2)
    sampler: str = required("that draws them: `ddpm`, `ddim` or `dpm-solver++`", choices=tuple(SAMPLERS))
    steps: int = required("and its steps", least=1)
    ddpm_steps: tuple[int, ...] = field((), "steps of `ddpm` in the comparison of samplers", least=1)
    ddim_steps: tuple[int, ...] = field((), "steps of `ddim` there", least=1)
    dpm_solver_pp_steps: tuple[int, ...] = field((), "steps of `dpm-solver++` there", least=1)

    @property
    def sampler_steps(self) -> list[tuple[str, int]]:
        """Sampler and steps of each line in the comparison of samplers."""
        listed = {"ddpm": self.ddpm_steps, "ddim": self.ddim_steps, "dpm-solver++": self.dpm_solver_pp_steps}
        return [(sampler, steps) for sampler, some in listed.items() for steps in some]


@dataclass(frozen=True)
class Model:
    """One line of the comparison of models, trained once for each seed.

    Attributes:
        name: such as N4, N4-halo2 or N4-no-position.
        config: of its runs, but for folder and seed.
    """

    name: str
    config: Config


@dataclass(frozen=True)
class Run:
    """One model trained with one seed.

    Attributes:
        name: of its folder below the study's.
        config: complete.
    """

    name: str
    config: Config

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.trainer.log_dir))


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study: `StudyConfig.load(path)` reads one."""

    trainer: TrainerConfig
    model: ModelConfig
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    study: StudySection

    def __post_init__(self) -> None:
        study, N = self.study, self.model.patch_divider
        if self.trainer.train_dataset_dir != BUILTIN_FACES or self.model.channels != 3:
            raise InputError(
                f'trainer.train_dataset_dir is "{self.trainer.train_dataset_dir}" and model.channels '
                f'{self.model.channels}; a study is one of "{BUILTIN_FACES}" in 3 channels.'
            )
        for listed in dataclasses.fields(study):
            values = getattr(study, listed.name)
            if isinstance(values, tuple) and len(set(values)) < len(values):
                raise InputError(f"study.{listed.name} is {list(values)}; it must name each value once.")
        if N == 1 or N not in study.patch_dividers:
            raise InputError(
                f"model.patch_divider is {N}; it must be more than 1 and one of study.patch_dividers, "
                f"{list(study.patch_dividers)}, because those with a halo or without conditioning are compared with it."
            )
        for sampler, steps in ((study.sampler, study.steps), *study.sampler_steps):
            SamplerConfig(name=sampler, steps=steps).resolve(self.diffusion.timesteps)
        sliced_wasserstein.levels(*self.model.image_shape)
        self.models()  # builds, and thereby checks, the configuration of each

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StudyConfig:
        """Read a configuration file.

        Raises:
            InputError: the file cannot be read, is not JSON, or holds a key or value that does not fit.
        """
        try:
            return strict_json.build(cls, strict_json.parse(strict_json.read_text(path)), "the configuration")
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, every default filled in."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def folder(self) -> Path:
        """Where everything lies."""
        return Path(self.trainer.log_dir)

    def models(self) -> list[Model]:
        """The models in the order of the table: N with all conditioning, then those with a halo, then the ablations."""
        N = self.model.patch_divider
        plain = [self._model(f"N{N}", N) for N in self.study.patch_dividers]
        halos = [self._model(f"N{N}-halo{halo}", N, halo=halo) for halo in self.study.halos]
        return plain + halos + [self._model(f"N{N}-{name}", N, *given) for name, given in ABLATIONS.items()]

    def runs(self, model: Model) -> list[Run]:
        """A model's runs, one for each seed."""
        return [self._run(model, seed) for seed in self.study.seeds]

    def reference(self) -> Model:
        """The model that samplers are compared with: N of the ablations, all conditioning, no halo."""
        return self._model(f"N{self.model.patch_divider}", self.model.patch_divider)

    def _model(self, name: str, N: int, position: bool = True, content: bool = True, halo: int = 0) -> Model:
        model = dataclasses.replace(
            self.model,
            patch_divider=N,
            halo=halo,
            position_conditioning=position,
            global_content_conditioning=content,
        )
        return Model(name, Config(trainer=self.trainer, model=model, diffusion=self.diffusion))

    def _run(self, model: Model, seed: int) -> Run:
        name = f"{model.name}-seed{seed}"
        trainer = dataclasses.replace(self.trainer, log_dir=str(self.folder / name), seed=seed)
        return Run(name, dataclasses.replace(model.config, trainer=trainer))

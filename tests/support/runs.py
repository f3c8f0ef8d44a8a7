"""Runs of training: a trainer to drive by hand, and what two runs must share."""

import torch
from accelerate import Accelerator

from patch_based_ddpm import Config, checkpoint
from patch_based_ddpm.data.sources import open_source
from patch_based_ddpm.training.run_folder import RunFolder
from patch_based_ddpm.training.trainer import Trainer
from support.commands import write_config


def make_trainer(folder, accelerator=None, **trainer):
    config = Config.load(write_config(folder, **trainer))
    run = RunFolder(folder / "run")
    run.create()
    source = open_source(config.trainer.train_dataset_dir, 16, 16, config.trainer.seed, None)
    accelerator = accelerator or Accelerator(cpu=True, mixed_precision=config.trainer.mixed_precision)
    return Trainer(config, accelerator, source, run)


def contents(trainer, step):
    return checkpoint.read(trainer.folder.checkpoint(step))


def assert_same(got, wanted):
    """Bit for bit, through dicts and lists."""
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(got, wanted)
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert_same(got[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted)
        for pair in zip(got, wanted, strict=True):
            assert_same(*pair)
    else:
        assert got == wanted


def timeless(lines):
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "peak_memory_mib")} for line in lines]

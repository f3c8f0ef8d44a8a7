"""Runs of training: images, a trainer to drive by hand, and the comparison of two runs."""

import torch
from accelerate import Accelerator
from PIL import Image

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


def mixed_images(folder):
    """Images of different sizes, kinds and modes in nested folders, one of them corrupt."""
    (folder / "more" / "deep").mkdir(parents=True)
    Image.linear_gradient("L").resize((40, 30)).save(folder / "grey.png")
    Image.radial_gradient("L").convert("RGB").resize((64, 48)).save(folder / "colour.JPG")
    Image.effect_mandelbrot((50, 50), (-2, -1.5, 1, 1.5), 50).convert("P").save(folder / "palette.png")
    Image.merge("RGBA", [Image.linear_gradient("L").resize((33, 70))] * 4).save(folder / "more" / "alpha.webp")
    Image.radial_gradient("L").convert("CMYK").resize((20, 90)).save(folder / "more" / "ink.tiff")
    Image.linear_gradient("L").resize((25, 25)).convert("I;16").save(folder / "more" / "deep" / "sixteen.png")
    Image.linear_gradient("L").rotate(90).convert("RGB").save(folder / "more" / "deep" / "plain.bmp")
    whole = (folder / "colour.JPG").read_bytes()
    (folder / "more" / "corrupt.jpeg").write_bytes(whole[: len(whole) // 2])
    return folder

import pytest
from accelerate import Accelerator

from patch_based_ddpm import train
from patch_based_ddpm.data.sources import open_source
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.training.run_folder import RunFolder
from patch_based_ddpm.training.trainer import Trainer
from support.commands import write_config

each_contradiction = pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preview_eta": 0.5, "preview_sampler": "ddpm"}, ["eta is 0.5", "ddpm always draws all its noise"]),
        ({"preview_order": 2, "preview_sampler": "ddim"}, ["order is 2", "ddim"]),
        ({"preview_sampler": "dpm"}, ['the sampler is "dpm"', "ddpm, ddim, dpm-solver++"]),
    ],
)


@each_contradiction
def test_the_command_refuses_a_preview_that_cannot_be_drawn(tmp_path, options, words):
    path = write_config(tmp_path, **options)
    with pytest.raises(InputError) as error:
        train.main(["--config", str(path)])
    assert str(error.value).startswith("trainer.preview_sampler")
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "run").exists()


@each_contradiction
def test_a_trainer_refuses_it_too(make_config, tmp_path, options, words):
    config = make_config(trainer=options)
    source = open_source("builtin:faces", 8, 8, 0, None)
    with pytest.raises(InputError) as error:
        Trainer(config, Accelerator(cpu=True), source, RunFolder(tmp_path / "run"))
    assert str(error.value).startswith("trainer.preview_sampler")
    assert all(word in str(error.value) for word in words)

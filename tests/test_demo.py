import numpy as np
import pytest
from PIL import Image

from patch_based_ddpm import demo
from support.commands import write_config


@pytest.mark.slow
def test_the_demo_trains_and_draws_a_grid_and_can_be_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "CONFIG", write_config(tmp_path, preview_count=0, train_num_steps=2))
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "run")
    for _ in range(2):
        demo.main()
        grid = tmp_path / "run" / "faces" / "grid.png"
        assert str(grid) in capsys.readouterr().out
    with Image.open(grid) as picture:
        assert picture.size == (6 * 18 + 2, 6 * 18 + 2)
        assert np.asarray(picture).std() > 10
    assert len(list(grid.parent.glob("*.png"))) == 37

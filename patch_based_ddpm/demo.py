"""The demo: train on the built-in faces for a few minutes, then draw a grid of new ones. `pipenv run demo` runs it."""

from pathlib import Path

from patch_based_ddpm import command_line, sample, train

CONFIG = Path(__file__).parents[1] / "configs" / "demo.json"
FOLDER = Path("logs") / "demo"  # where the config sends the run


def main() -> None:
    """Train, or go on where an earlier demo stopped, then sample."""
    train.main(["--config", str(CONFIG), "--resume", "latest"])
    checkpoint = FOLDER / "checkpoints" / "model-last.pt"
    faces = ["--out-dir", str(FOLDER / "faces"), "--n-samples", "36", "--grid", "--overwrite"]
    fast = ["--sampler", "ddim", "--steps", "100", "--eta", "1", "--batch-size", "36"]
    sample.main(["--ckpt", str(checkpoint), *faces, *fast])


if __name__ == "__main__":
    command_line.run(main)

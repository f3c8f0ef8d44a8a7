"""Export one set of weights as a safetensors file: `python -m patch_based_ddpm.checkpoint export`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from patch_based_ddpm import command_line
from patch_based_ddpm.checkpoint import check_path, load_diffusion, safetensors
from patch_based_ddpm.errors import InputError, explain_os_error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or with the process's own."""
    args = _parser().parse_args(argv)
    if args.out.is_dir():
        raise InputError(f"--out {str(args.out)!r} is a folder; it must be a file.")
    if not args.out.parent.is_dir():
        raise InputError(f"--out {str(args.out)!r} cannot be written: there is no folder {str(args.out.parent)!r}.")
    if args.out.exists() and args.out.samefile(check_path(args.ckpt)):
        raise InputError(f"--out {str(args.out)!r} is the checkpoint itself; it must be another file.")
    diffusion = load_diffusion(args.ckpt, config=args.config, weights=args.weights)
    state = _converted(diffusion.unet.state_dict(), args.dtype)
    with explain_os_error(f"--out {str(args.out)!r} cannot be written"):
        safetensors.write(args.out, diffusion.config, args.weights, state)
    values = sum(tensor.numel() for tensor in state.values())
    print(f'{args.out}: the weights "{args.weights}" of {args.ckpt}, {values:,} values in {args.dtype}.')


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="patch_based_ddpm.checkpoint",
        description="export: write one set of a checkpoint's weights as a safetensors file.",
    )
    parser.add_argument("action", choices=("export",), help="what to do with the checkpoint")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint of any kind")
    parser.add_argument("--config", metavar="FILE", help="config file; only a published checkpoint needs it")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file to write")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or last (default: ema)")
    parser.add_argument(
        "--dtype", choices=tuple(command_line.DTYPES), default="float32", help="to store them in (default: float32)"
    )
    return parser


def _converted(state: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    stored = {name: values.to(command_line.DTYPES[dtype]) for name, values in state.items()}
    for name, values in state.items():
        if not torch.equal(values.isfinite(), stored[name].isfinite()):  # fp16 ends at 65504
            largest = values.abs().max().item()
            raise InputError(f"--dtype {dtype} cannot hold {name}, whose largest value is {largest:g}.")
    return stored


if __name__ == "__main__":
    command_line.run(main)

"""Where a model runs, in which precision, and with which kernels: options that several subcommands share."""

import argparse
import sys
from typing import Any

from proscale_hf.benchmarking.workload import DTYPES
from proscale_hf.cli.console import CommandError


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`, `--dtype` and `--use-kernels`."""
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of weights and computation; bfloat16 is faster on GPUs and newer CPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--use-kernels",
        action="store_true",
        help="use the compiled deformable attention: of PROSCALE_KERNEL_DIR, or of the Hub",
    )


def place_model(model: Any, options: argparse.Namespace, device: Any = None) -> None:
    """Moves a model to where the options say, in the precision that they say.

    Args:
        model: the segmentation model.
        options: the parsed command line, with what `add_device_options` adds.
        device: where to, if the options do not decide that.

    Raises:
        CommandError: there is no such device, no room on it, or no library that loads kernels.
    """
    import torch

    from proscale_hf.files.text import one_line
    from proscale_hf.layers.kernels import PYTORCH

    device = device or options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(device, getattr(torch, options.dtype))
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"cannot put the model on {device}: {one_line(error)}", exit_code=2) from error
    if options.use_kernels:
        try:
            model.set_use_kernels(True)
        except ImportError as error:
            raise CommandError('--use-kernels needs the library kernels: pip install "proscale-hf[kernels]"') from error
        if model.deformable_attention_backend == PYTORCH:
            print("no compiled kernel could be had, so deformable attention runs in PyTorch", file=sys.stderr)

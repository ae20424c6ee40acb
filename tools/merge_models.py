"""Merge SDXL checkpoints: weighted sum or added difference, also by block, one tensor at a time.

`python tools/merge_models.py --models a.safetensors b.safetensors --ratios 0.7 0.3 --output ab.safetensors`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import entry_point
from library.log import setup_logging

_PRECISIONS = ("float", "fp16", "bf16")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Merge SDXL checkpoints, one tensor at a time.", allow_abbrev=False)
    parser.add_argument("--models", nargs="+", required=True, metavar="PATH", help="single files; or tiny")
    parser.add_argument(
        "--ratios", nargs="+", type=float, metavar="R", help="one for each model; default: equal shares"
    )
    parser.add_argument("--add_difference", action="store_true", help="A + (B - C) x ratio, with three models")
    parser.add_argument(
        "--lbws", nargs="+", metavar="LIST",
        help="block weights of each model but the first: lists of 12, 17, 20, 23 or 26 numbers",
    )  # fmt: skip
    parser.add_argument("--unet_only", action="store_true", help="merge the U-Net, take the rest from the first model")
    parser.add_argument("--precision", choices=_PRECISIONS, default="float", help="computed in; default: float")
    parser.add_argument("--saving_precision", choices=_PRECISIONS, default="float", help="saved in; default: float")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write")
    parser.add_argument("--show_skipped", action="store_true", help="list tensors that not every model has")
    return parser


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Merge; returns the exit code."""
    arguments = _parser().parse_args(argv)
    setup_logging("INFO", None, simple=True)
    from library.models.merge_tool import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())

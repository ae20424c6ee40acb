"""Convert an SDXL model between a single file and a diffusers folder.

`python tools/convert_checkpoint.py model.safetensors folder`, or the other way round.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import entry_point


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert an SDXL model between a single file and a diffusers folder, one tensor at a time.",
        allow_abbrev=False,
    )
    parser.add_argument("model_to_load", help="single file (.safetensors, .ckpt), diffusers folder, hub id, or tiny")
    parser.add_argument("model_to_save", help="a name that ends in .safetensors for a single file, else a folder")
    parser.add_argument("--fp16", action="store_true", help="save in float16; without a precision, as it is stored")
    parser.add_argument("--bf16", action="store_true", help="save in bfloat16")
    parser.add_argument("--float", action="store_true", help="save in float32")
    parser.add_argument("--save_precision_as", choices=["fp16", "bf16", "float"], help="the same as one flag")
    parser.add_argument("--variant", choices=["fp16"], help="read a folder's fp16 files where it has both")
    parser.add_argument("--metadata", metavar="JSON", help='texts for the header, e.g. \'{"modelspec.title": "mine"}\'')
    return parser


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Convert one model; returns the exit code."""
    arguments = _parser().parse_args(argv)
    from library.data.progress import progress_bar
    from library.models.convert_tool import run

    return run(arguments, bar=partial(progress_bar, title="convert", unit="read", delay=2.0))


if __name__ == "__main__":
    sys.exit(main())

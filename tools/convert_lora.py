"""Convert a LoRA among sd-scripts', diffusers' and PEFT's names.

`python tools/convert_lora.py --model in.safetensors --save_to out.safetensors --to diffusers`
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import entry_point

_LAYOUTS = ("sd-scripts", "comfyui", "a1111", "sd-scripts-diffusers", "diffusers", "peft")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert a LoRA or DoRA for SDXL among the names that programs use; the source's are recognised.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="PATH", help="LoRA file, or folder of PEFT adapters")
    parser.add_argument("--save_to", required=True, metavar="PATH", help="file to write (for peft: folder)")
    parser.add_argument(
        "--to",
        required=True,
        choices=_LAYOUTS,
        help="sd-scripts (also for ComfyUI and A1111: comfyui and a1111 are the same), the same with diffusers' block "
        "names, diffusers' own names, or a folder of PEFT adapters",
    )
    parser.add_argument(
        "--fold_alpha",
        action="store_true",
        help="diffusers and peft: multiply alpha into the weights instead of writing it to the header",
    )
    return parser


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Convert one file; returns the exit code."""
    arguments = _parser().parse_args(argv)
    from library.data.progress import progress_bar
    from library.models.lora_tool import run

    return run(arguments, bar=partial(progress_bar, title="convert", unit="read", delay=2.0))


if __name__ == "__main__":
    sys.exit(main())

"""Take the smaller networks out of a DyLoRA: one LoRA file for each multiple of --unit below its rank.

    python tools/extract_lora_from_dylora.py --model dylora.safetensors --unit 4 --save_to lora.safetensors

writes lora-0004.safetensors, lora-0008.safetensors and so on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import entry_point
from library.inference.lora_tools.arguments import parse
from library.log import setup_logging


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Extract; returns the exit code."""
    args = parse("extract_lora_from_dylora", argv)
    setup_logging()
    from library.inference.lora_tools.commands import extract_from_dylora

    return extract_from_dylora(args)


if __name__ == "__main__":
    sys.exit(main())

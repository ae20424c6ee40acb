"""Merge LoRAs into the best LoRA of a given rank.

    python tools/svd_merge_lora.py --models a.safetensors b.safetensors --ratios 0.8 0.5 --new_rank 16 \\
        --save_to c.safetensors

Prints how much of the sum the rank leaves out.
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
    """Merge; returns the exit code."""
    args = parse("svd_merge_lora", argv)
    setup_logging()
    from library.inference.lora_tools.commands import svd_merge

    return svd_merge(args)


if __name__ == "__main__":
    sys.exit(main())

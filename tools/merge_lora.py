"""Merge LoRAs into a checkpoint, or into one LoRA.

    python tools/merge_lora.py --sd_model base.safetensors --models a.safetensors --ratios 0.8 --save_to out.safetensors
    python tools/merge_lora.py --models a.safetensors b.safetensors --ratios 0.8 0.5 --save_to both.safetensors

Nothing is held in memory but one tensor at a time.
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
    args = parse("merge_lora", argv)
    setup_logging()
    from library.inference.lora_tools.commands import merge

    return merge(args)


if __name__ == "__main__":
    sys.exit(main())

"""Extract a LoRA from the difference of two checkpoints.

    python tools/extract_lora.py --model_org base.safetensors --model_tuned tuned.safetensors --dim 32 \\
        --save_to lora.safetensors

Linear layers and, with --conv_dim, convolutions; prints how much of the change the rank leaves out.
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
    args = parse("extract_lora", argv)
    setup_logging()
    from library.inference.lora_tools.commands import extract

    return extract(args)


if __name__ == "__main__":
    sys.exit(main())

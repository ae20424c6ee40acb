"""Give a LoRA another rank, or every module its own.

    python tools/resize_lora.py --model lora.safetensors --new_rank 8 --save_to small.safetensors
    python tools/resize_lora.py --model lora.safetensors --new_rank 32 --dynamic_method sv_fro --dynamic_param 0.95 \\
        --save_to small.safetensors

Prints how much of the change the new ranks leave out.
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
    """Resize; returns the exit code."""
    args = parse("resize_lora", argv)
    setup_logging()
    from library.inference.lora_tools.commands import resize

    return resize(args)


if __name__ == "__main__":
    sys.exit(main())

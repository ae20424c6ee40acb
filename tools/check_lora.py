"""Show how much a LoRA changes in every block, and what is broken: `python tools/check_lora.py lora.safetensors`.

--png draws it. The exit code is 1 when a module holds NaN or infinity.
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
    """Print the tables, draw the picture; returns the exit code."""
    args = parse("check_lora", argv)
    setup_logging()
    from library.inference.lora_tools.commands import check

    return check(args)


if __name__ == "__main__":
    sys.exit(main())

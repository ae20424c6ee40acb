"""Show and edit what a safetensors header says: `python tools/show_metadata.py net.safetensors`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import entry_point


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Show what a safetensors file says about itself; change it without touching the tensors.",
        allow_abbrev=False,
    )
    parser.add_argument("file", nargs="?", help="safetensors file")
    parser.add_argument("--model", metavar="FILE", help="the same, as sd-scripts spells it")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="how many tags are listed; default: 20")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument("--edit", action="append", default=[], metavar="KEY=VALUE", help="set a text; repeatable")
    parser.add_argument("--remove", action="append", default=[], metavar="KEY", help="remove a text; repeatable")
    parser.add_argument("--save_to", metavar="FILE", help="write the edited file here instead of in its place")
    parser.add_argument("--thumbnail", metavar="FILE", help="save the picture in the header to this file")
    return parser


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Show or edit one file; returns the exit code."""
    arguments = _parser().parse_args(argv)
    from library.io.metadata_report import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())

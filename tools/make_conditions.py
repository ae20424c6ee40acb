"""Make condition images for a ControlNet-LLLite: `python tools/make_conditions.py pictures conditions --kind canny`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.conditions import KINDS, Settings
from library.errors import entry_point


def _parser() -> argparse.ArgumentParser:
    start = Settings()
    parser = argparse.ArgumentParser(
        description="Make a condition image from each picture of a folder (and of its sub-folders), under its stem. "
        "What is there already is kept, so a run that was stopped goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("pictures", type=Path, help="folder of the pictures")
    parser.add_argument("conditions", type=Path, help="folder for the conditions; made when it is missing")
    parser.add_argument(
        "--kind", choices=sorted(KINDS), required=True,
        help="; ".join(f"{name}: {meaning}" for name, meaning in KINDS.items()),
    )  # fmt: skip
    parser.add_argument("--low", type=_level, default=start.low, help="canny: an edge goes on above this (%(default)s)")
    parser.add_argument(
        "--high", type=_level, default=start.high, help="canny: an edge begins above this (%(default)s)"
    )
    parser.add_argument(
        "--blur", type=_share, default=start.blur, help="blur: its width, as a share of the shorter side (%(default)s)"
    )
    parser.add_argument(
        "--cells", type=_count, default=start.cells, help="palette: cells along the shorter side (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="make conditions anew that are there already")
    return parser


def _level(text: str) -> float:
    value = float(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must lie above 0 and at most at 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Make what is missing and report; returns the exit code, 1 when no picture could be read."""
    args = _parser().parse_args(argv)
    from library.data.conditions import make_conditions

    settings = Settings(low=args.low, high=args.high, blur=args.blur, cells=args.cells)
    made = make_conditions(args.pictures, args.conditions, kind=args.kind, settings=settings, overwrite=args.overwrite)
    for line in made.lines():
        print(line)
    return 0 if made.written or made.kept else 1


if __name__ == "__main__":
    sys.exit(main())

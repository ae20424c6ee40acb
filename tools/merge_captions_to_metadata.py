"""Put captions into a metadata file: `python tools/merge_captions_to_metadata.py FOLDER META.json`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.data.merge_tool import run_merge
from library.errors import entry_point


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Read the folder, extend the file; returns the exit code."""
    return run_merge(
        argv, name="caption", extension=".caption", description="put captions beside images into a metadata file"
    )


if __name__ == "__main__":
    sys.exit(main())

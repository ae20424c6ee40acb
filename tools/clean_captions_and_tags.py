"""Clean the captions and tags of a metadata file: `python tools/clean_captions_and_tags.py IN.json OUT.json`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.data.metadata_tools import clean, read_entries, write_entries
from library.errors import entry_point


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Read, clean, write; returns the exit code."""
    parser = argparse.ArgumentParser(description="clean the captions and tags of a metadata file", allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE", help="in_json out_json")
    parser.add_argument("--debug", action="store_true", help="print every entry")
    args = parser.parse_args(argv)
    if len(args.files) not in (2, 3):
        parser.error("name in_json and out_json")
    # an older form of the command has the image folder first
    source, target = map(Path, args.files[-2:])
    metadata = read_entries(source)
    without_tags, without_caption = clean(metadata)
    if args.debug:
        for key, entry in metadata.items():
            print(f"{key}: {entry.get('caption')} | {entry.get('tags')}")
    for name, keys in (("tags", without_tags), ("caption", without_caption)):
        if keys:
            print(f"{len(keys)} images have no {name}: {', '.join(keys[:5])}", file=sys.stderr)
    write_entries(target, metadata)
    print(f"{len(metadata)} entries in {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

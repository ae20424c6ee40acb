"""What the two merge tools share: their arguments and the way from a folder to a metadata file."""

from __future__ import annotations

import argparse
from pathlib import Path

from library.data.metadata_tools import find_images, merge, read_entries, read_texts, write_entries
from library.errors import UserError


def run_merge(argv: list[str] | None, *, name: str, extension: str, description: str) -> int:
    """Put the text files beside the images into the field `name` of a metadata file; returns the exit code.

    Without --in_json an existing out_json is extended. Raises UserError.
    """
    args = _parser(extension, description).parse_args(argv)
    if args.recursive and not args.full_path:
        fix = "add --full_path: images of several folders may have one stem"
        raise UserError("--recursive needs --full_path", where="--recursive", fix=fix)
    output = Path(args.out_json)
    source = Path(args.in_json) if args.in_json else output
    metadata = read_entries(source) if args.in_json or output.is_file() else {}
    images = find_images(Path(args.train_data_dir), recursive=args.recursive)
    texts = read_texts(images, extension=_with_dot(args.caption_extention or args.caption_extension))
    merged = merge(metadata, images, texts, name=name, full_path=args.full_path)
    if args.debug:
        for path, key, text in zip(images, merged.keys, texts, strict=True):
            print(f"{path} {key} {text}")
    if merged.shared:
        print(f"{len(merged.shared)} names stand for several images (use --full_path): {', '.join(merged.shared[:5])}")
    write_entries(output, metadata)
    print(f"{len(images)} images, {merged.new} of them new; {len(metadata)} entries in {output}")
    return 0


def _with_dot(extension: str) -> str:
    return extension if extension.startswith(".") else f".{extension}"


def _parser(extension: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("train_data_dir", help="folder of images")
    parser.add_argument("out_json", help="metadata file to write")
    parser.add_argument("--in_json", help="metadata file to extend (unset: out_json, when it exists)")
    parser.add_argument("--caption_extension", default=extension, help=f"extension of text files ({extension})")
    parser.add_argument("--caption_extention", help=argparse.SUPPRESS)
    parser.add_argument("--full_path", action="store_true", help="name images by their path instead of their stem")
    parser.add_argument("--recursive", action="store_true", help="search sub-folders too (needs --full_path)")
    parser.add_argument("--debug", action="store_true", help="print every image")
    return parser

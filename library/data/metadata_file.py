"""The metadata file of sd-scripts' fine-tuning tools: image names with caption, tags and sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.toml_file import read_text
from library.errors import UserError


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a metadata file. `image_size` is (width, height) in pixels."""

    key: str
    caption: str
    tags: str
    image_size: tuple[int, int] | None


def read_metadata(path: Path) -> list[Entry]:
    """The entries of a .json or .jsonl file in its order. Raises UserError with file and line for what is wrong.

    JSON holds `{image_key: {"caption", "tags", "image_size", "train_resolution", ...}}`, JSONL one object per line
    with the key as `image_path`. All fields are optional; `train_resolution` is accepted and not needed, because the
    bucket follows from the image size; unknown fields are left alone.
    """
    if not path.is_file():
        raise UserError("the metadata file does not exist", where=str(path), fix="check metadata_file / in_json")
    text = read_text(path, what="the metadata file")
    parse = _parse_lines if path.suffix.lower() == ".jsonl" else _parse_object
    entries = [_entry(key, values, path) for key, values in parse(path, text)]
    if not entries:
        raise UserError(
            "the metadata file names no image",
            where=f"{path} line 1",
            fix="write it with tools/merge_captions_to_metadata.py",
        )
    return entries


def load_object(path: Path, text: str) -> dict[str, Any]:
    """The JSON object that a file's text holds; {} for an empty file. Raises UserError with file and line."""
    if not text.strip():
        return {}
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"this is not JSON: {error.msg}", where=f"{path} line {error.lineno}") from error
    if not isinstance(data, dict):
        raise UserError(
            "the metadata file must hold an object", where=f"{path} line 1", fix='{"image.png": {"caption": "..."}}'
        )
    return data


def locate(path: Path, key: str) -> str:
    """File and line of the entry of `key`; reads the file again, since only errors ask."""
    text = read_text(path, what="the metadata file")
    forms = {re.escape(json.dumps(key, ensure_ascii=ascii_only)) for ascii_only in (True, False)}
    name = f"(?:{'|'.join(forms)})"
    found = re.search(rf'{name}\s*:|"image_path"\s*:\s*{name}', text)
    line = text.count("\n", 0, found.start()) + 1 if found else 1
    return f"{path} line {line}"


def _parse_object(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    yield from load_object(path, text).items()


def _parse_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"this is not JSON: {error.msg}", where=where, fix="write one object per line") from error
        key = values.get("image_path") if isinstance(values, dict) else None
        if not isinstance(key, str):
            raise UserError("this line names no image", where=where, fix='{"image_path": "...", "caption": "..."}')
        yield key, values


def _entry(key: str, values: Any, path: Path) -> Entry:
    if not isinstance(values, dict):
        raise UserError(
            f"the entry of {key!r} is not an object", where=locate(path, key), fix='write {"caption": "..."}'
        )
    if not key.strip():
        raise UserError("an image has an empty name", where=locate(path, key), fix="name its file")
    texts = {}
    for name in ("caption", "tags"):
        value = values.get(name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"the {name} of {key!r} must be a text", where=locate(path, key), fix="put it in quotes")
        texts[name] = value or ""
    sizes = {name: _size(key, name, values.get(name), path) for name in ("image_size", "train_resolution")}
    return Entry(key, texts["caption"], texts["tags"], sizes["image_size"])


def _size(key: str, name: str, value: Any, path: Path) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    raise UserError(
        f"the {name} of {key!r} must be two whole numbers above 0, width and height",
        where=locate(path, key),
        fix="[1024, 768]",
    )

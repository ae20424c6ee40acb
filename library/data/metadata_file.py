"""The metadata file of sd-scripts' fine-tuning tools: image names with caption, tags and sizes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from library.config.toml_file import read_text
from library.data.bulk import no_garbage_collection
from library.errors import UserError


class Entry(NamedTuple):
    """One image of a metadata file. `image_size` is (width, height) in pixels."""

    key: str
    caption: str
    tags: str
    image_size: tuple[int, int] | None


class Metadata(NamedTuple):
    """The entries of a metadata file in its order, and for keys of images what is said twice there."""

    entries: list[Entry]
    repeated: list[tuple[str, str]]


def read_metadata(path: Path) -> Metadata:
    """Read a .json or .jsonl file. Raises UserError with file and line for what is wrong.

    JSON holds `{image_key: {"caption", "tags", "image_size", "train_resolution", ...}}`, JSONL one object per line
    with the key as `image_path`. All fields are optional; `train_resolution` is accepted and not needed, because the
    bucket follows from the image size; unknown fields are left alone. Of a name that stands twice in one object the
    last value counts.
    """
    if not path.is_file():
        raise UserError("the metadata file does not exist", where=str(path), fix="check metadata_file / in_json")
    text = read_text(path, what="the metadata file")
    parse = _parse_lines if path.suffix.lower() == ".jsonl" else _parse_object
    once = _Once()
    with no_garbage_collection():
        items = list(parse(path, text, once))
        entries = [_entry(key, values, path) for key, values in items]
    if not entries:
        raise UserError(
            "the metadata file names no image",
            where=f"{path} line 1",
            fix="write it with tools/merge_captions_to_metadata.py",
        )
    return Metadata(entries, list(once.reasons(items)))


class _Once:
    """Makes JSON objects like dict, and remembers those in which a name stands more than once.

    `names_images` is the object, if there is one, whose names are image keys.
    """

    def __init__(self) -> None:
        self.names_images: dict[str, Any] | None = None
        self._found: list[tuple[dict[str, Any], list[str]]] = []

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            self._found.append((made, [name for name, count in counts.items() if count > 1]))
        return made

    def reasons(self, items: list[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
        """(key, sentence) of each entry that stands twice in the file, or in which a field does."""
        key_of = {id(values): key for key, values in items} if self._found else {}
        for made, names in self._found:
            if made is self.names_images:
                yield from ((key, "the metadata names it more than once; the last entry counts") for key in names)
            elif id(made) in key_of:
                fields = ", ".join(names)
                yield key_of[id(made)], f"its metadata has {fields} more than once; the last one counts"


def load_object(path: Path, text: str, *, make: Callable[[list[tuple[str, Any]]], Any] | None = None) -> dict[str, Any]:
    """The JSON object that a file's text holds; {} for an empty file. Raises UserError with file and line.

    `make` turns the (name, value) pairs of each object into that object; dict by default.
    """
    if not text or text.isspace():
        return {}
    try:
        data = json.loads(text, object_pairs_hook=make)
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


def _parse_object(path: Path, text: str, once: _Once) -> Iterator[tuple[str, Any]]:
    once.names_images = load_object(path, text, make=once)
    yield from once.names_images.items()


def _parse_lines(path: Path, text: str, once: _Once) -> Iterator[tuple[str, Any]]:
    parse = json.JSONDecoder(object_pairs_hook=once).decode
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            values = parse(line)
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
    caption, tags = (_text(key, name, values.get(name), path) for name in ("caption", "tags"))
    size = _size(key, "image_size", values.get("image_size"), path)
    _size(key, "train_resolution", values.get("train_resolution"), path)
    return Entry(key, caption, tags, size)


def _text(key: str, name: str, value: Any, path: Path) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise UserError(f"the {name} of {key!r} must be a text", where=locate(path, key), fix="put it in quotes")


def _size(key: str, name: str, value: Any, path: Path) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2:
        width, height = value
        if type(width) is int and type(height) is int and width > 0 and height > 0:
            return width, height
    raise UserError(
        f"the {name} of {key!r} must be two whole numbers above 0, width and height",
        where=locate(path, key),
        fix="[1024, 768]",
    )

"""Making and cleaning metadata files: captions and tags from text files beside images (cache_formats.md §3)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.toml_file import read_text
from library.data.metadata_file import load_object, locate
from library.errors import UserError
from library.io.atomic import write_text

Metadata = dict[str, dict[str, Any]]
"""Entries by image key: the file's stem, or its path as it was named."""

LISTED = 5
"""How many names an error holds before it is cut short."""


@dataclass(frozen=True)
class Merged:
    """What a merge did: the keys in order of the images, those that are new, and those that several images share."""

    keys: tuple[str, ...]
    new: int
    shared: tuple[str, ...]


def find_images(folder: Path, *, recursive: bool) -> list[Path]:
    """The image files in `folder`, or also below it, sorted by path. Raises UserError when there is none."""
    from library.io.images import IMAGE_EXTENSIONS  # brings in the image libraries, which --help does without

    if not folder.is_dir():
        raise UserError("the image folder does not exist", where=str(folder), fix="check train_data_dir")
    paths = folder.rglob("*") if recursive else folder.iterdir()
    found = sorted(
        path
        for path in paths
        if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        fix = "put images there" if recursive else "put images there, or search sub-folders: --recursive --full_path"
        raise UserError("the image folder holds no image", where=str(folder), fix=fix)
    return found


def read_texts(images: Sequence[Path], *, extension: str) -> list[str]:
    """The text file of each image, stripped, line breaks kept. Raises UserError naming the images without one."""
    files = [path.with_suffix(extension) for path in images]
    missing = [str(path) for path, file in zip(images, files, strict=True) if not file.is_file()]
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise UserError(
            f"{len(missing)} of {len(images)} images have no {extension} file",
            where=", ".join(missing[:LISTED]) + more,
            fix="write these files, or name their extension in --caption_extension",
        )
    return [read_text(file, what="the text file").strip() for file in files]


def merge(metadata: Metadata, images: Sequence[Path], texts: Iterable[str], *, name: str, full_path: bool) -> Merged:
    """Set the field `name` ("caption" or "tags") of every image in `metadata`; other fields and images stay."""
    keys = [str(path) if full_path else path.stem for path in images]
    new = len(set(keys) - metadata.keys())
    for key, text in zip(keys, texts, strict=True):
        metadata.setdefault(key, {})[name] = text
    counts: dict[str, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return Merged(tuple(keys), new, tuple(key for key, count in counts.items() if count > 1))


def read_entries(path: Path) -> Metadata:
    """The entries of a metadata file. Raises UserError with the line for what is no metadata."""
    if not path.is_file():
        raise UserError("the metadata file does not exist", where=str(path), fix="check in_json")
    entries = load_object(path, read_text(path, what="the metadata file"))
    for key, values in entries.items():
        wrong = not isinstance(values, dict) or any(
            not isinstance(values.get(name, ""), str) for name in ("caption", "tags")
        )
        if wrong:
            raise UserError(
                f"the entry of {key!r} must be an object with texts", where=locate(path, key), fix='{"caption": "..."}'
            )
    return entries


def write_entries(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a metadata file: indented by 2, ASCII only, whole or not at all."""
    write_text(path, json.dumps(metadata, indent=2))


def clean(metadata: Metadata) -> tuple[list[str], list[str]]:
    """Clean every caption and all tags in place; returns the keys without tags and those without a caption."""
    for entry in metadata.values():
        if "tags" in entry:
            entry["tags"] = clean_tags(entry["tags"])
        if "caption" in entry:
            entry["caption"] = clean_caption(entry["caption"])
    lacking = [[key for key, entry in metadata.items() if name not in entry] for name in ("tags", "caption")]
    return lacking[0], lacking[1]


_HAIR_LENGTH = re.compile(r"(long|short|medium) hair")
_ANY_HAIR = re.compile(r"[\w\-]+ hair")
_ONE_PER_PICTURE = (
    _HAIR_LENGTH,
    re.compile(r"(bob|hime) cut"),
    re.compile(r"[\w\-]+ eyes"),
    re.compile(r"[\w\-]+ sleeves|sleeveless"),
    re.compile(
        r"ponytail|braid|ahoge|twintails|[\w\-]+ bun|single hair bun|single side bun|two side up|two tails"
        r"|[\w\-]+ braid|sidelocks"
    ),
)
_PLAIN = re.compile(r"[\w\-]+|hair ornament")
_SMILE, _HELD = "^_^", "^\0^"


def clean_tags(tags: str) -> str:
    """Tags with spaces for underscores, without ratings and without what contradicts or repeats itself.

    With several persons ("girls" or "boys" in the text) a family of looks (hair, eyes, sleeves, style) of which two
    are named is dropped, because nothing says whose they are; one hair length is kept. A plain tag goes when a longer
    one ends in it: "shirt" beside "white shirt".
    """
    text = tags.replace(_SMILE, _HELD).replace("_", " ").replace(_HELD, _SMILE).split(", rating")[0]
    parts = text.split(", ")
    if "girls" in text or "boys" in text:
        for family in _ONE_PER_PICTURE:
            parts = _drop_if_several(parts, [part for part in parts if family.fullmatch(part)])
        hair = [part for part in parts if _ANY_HAIR.fullmatch(part) and not _HAIR_LENGTH.fullmatch(part)]
        parts = _drop_if_several(parts, hair)
    for plain in [part for part in parts if _PLAIN.fullmatch(part)]:
        if any(re.fullmatch(rf"(\w+ )+{re.escape(plain)}", part) for part in parts):
            parts = [part for part in parts if part != plain]
    return ", ".join(part for part in parts if part)


def _drop_if_several(parts: list[str], found: list[str]) -> list[str]:
    return [part for part in parts if part not in found] if len(found) > 1 else parts


_PERSONS = {"female": "girl", "lady": "girl", "woman": "girl", "women": "girls", "people": "girls", "person": "girl"}
_PICTURES = {"figure": "a", "image": "an", "picture": "a", "drawing": "a"}
_CAPTION_RULES = (
    ("anime anime", "anime"),
    ("young ", ""),
    *(
        (f"{style} {word}", girl)
        for style in ("cartoon", "anime")
        for word, girl in {**_PERSONS, "character": "girl", "girl": "girl"}.items()
    ),
    *_PERSONS.items(),
    *(
        (f"{style} {word}", f"{article} {word}")
        for style in ("an anime cartoon", "a cartoon anime", "a cartoon")
        for word, article in _PICTURES.items()
    ),
    ("girl girl", "girl"),
)


def clean_caption(caption: str) -> str:
    """A caption with one word for all persons and no word for the drawing style; each rule until nothing changes."""
    for old, new in _CAPTION_RULES:
        while old in caption:
            caption = caption.replace(old, new)
    return caption

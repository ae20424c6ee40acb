"""parameters.jsonl beside the pictures: one JSON object for each, on a line of its own.

A line is written when its picture is there, in one write, so an interrupted run leaves at most a torn last line, which
the next run takes away. Ranks write parts of their own (parameters.rank1.jsonl), which whoever is last puts together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from library.inference.parameters_text import MadeBy
from library.inference.request import GenRequest
from library.io.atomic import explained, write_text
from library.log import get_logger

logger = get_logger(__name__)

NAME = "parameters.jsonl"
_PART = "parameters.rank{}.jsonl"
_NOT_WRITTEN = ("batch", "number", "name", "seeds", "size")

Entry = Mapping[str, Any]


def entry_of(request: GenRequest, made: MadeBy, *, number: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is written about picture `number` (from 1) before its file is known.

    settings: what else decides how it looks and is written; the fingerprint is made of it, the request and `made`.
    """
    said = {
        field.name: _plain(getattr(request, field.name)) for field in fields(request) if field.name not in _NOT_WRITTEN
    }
    files = {
        "model": made.model,
        "vae": made.vae or None,
        "networks": [vars(use) for use in made.networks],
    }
    whole = {"width": request.size.w, "height": request.size.h, **said, **files}
    text = json.dumps([whole, dict(settings)], sort_keys=True, ensure_ascii=False, default=str)
    fingerprint = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:32]
    return {"number": number, "fingerprint": fingerprint, **whole}


def _plain(value: Any) -> Any:
    """What JSON can hold; an upscaler is its class, since the option that names it is one of the settings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if value is None or isinstance(value, (str, int, float, list, tuple)):
        return value
    return type(value).__qualname__


class PictureLog:
    """The parameters.jsonl of a folder, written by one process or by several ranks."""

    def __init__(self, folder: Path, *, rank: int | None = None) -> None:
        self.folder, self.whole = folder, folder / NAME
        self.path = self.whole if rank is None else folder / _PART.format(rank)

    def start(self, *, afresh: bool) -> None:
        """Take a torn last line away; with `afresh`, a rank's part of an earlier run altogether."""
        if afresh and self.path != self.whole:
            self.path.unlink(missing_ok=True)
        if not self.path.is_file():
            return
        with explained(self.path), open(self.path, "rb+") as file:
            data = file.read()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                logger.warning("%s ended in half a line, which is taken away", self.path)
                file.truncate(end)

    def add(self, entry: Entry) -> None:
        """Write a line. The file is opened for each, since another rank may have put its lines into the whole."""
        line = json.dumps(entry, ensure_ascii=False).encode(errors="replace") + b"\n"
        with explained(self.path, left_behind="the pictures so far are complete"), open(self.path, "ab", 0) as file:
            file.write(line)

    def entries(self) -> list[dict[str, Any]]:
        """The lines of the whole and of all parts; of several for one file the last. What is no entry is left out."""
        by_file: dict[str, dict[str, Any]] = {}
        for path in (self.whole, *self._parts()):
            for entry in _read(path):
                by_file.pop(entry["file"], None)
                by_file[entry["file"]] = entry
        return list(by_file.values())

    def settle(self, own: Sequence[Entry]) -> None:
        """Make one file: the lines of other runs as they were, then these, each file and each picture once.

        `own` must hold everything that the parts hold about this run; the parts are removed.
        """
        files = {entry["file"] for entry in own}
        same = {_identity(entry) for entry in own}
        others = [entry for entry in self.entries() if entry["file"] not in files and _identity(entry) not in same]
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in (*others, *own))
        if not self.whole.is_file() or self.whole.read_bytes() != text.encode():
            write_text(self.whole, text)
        for path in self._parts():
            path.unlink(missing_ok=True)

    def is_there(self, entry: Entry) -> bool:
        """Whether the picture of a line is in the folder, as large a file as it was written."""
        try:
            return os.path.getsize(self.folder / entry["file"]) == entry["bytes"]
        except (OSError, KeyError, TypeError, ValueError):
            return False

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(_PART.format("[0-9]*")))


def _identity(entry: Entry) -> tuple[Any, Any]:
    return entry.get("number"), entry.get("fingerprint")


def _read(path: Path) -> Iterable[dict[str, Any]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:  # there is none, or a rank has just put it into the whole
        return
    lines, complete = data.split(b"\n"), data.endswith(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line or (number == len(lines) and not complete):
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("file"), str):
            yield entry
        else:
            logger.warning("%s line %d is not about a picture and is left out", path, number)

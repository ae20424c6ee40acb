"""TOML in and out: reading with the line of every key, writing without a dependency."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.sizes import Size

KeyPath = tuple[str | int, ...]

_KEY_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
_DOTTED = rf"{_KEY_PART}(?:[ \t]*\.[ \t]*{_KEY_PART})*"
_HEADER = re.compile(rf"[ \t]*(\[\[?)[ \t]*({_DOTTED})[ \t]*\]\]?")
_ASSIGNMENT = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")
_AT_LINE = re.compile(r" \(at line (\d+), column \d+\)$")


@dataclass(frozen=True)
class TomlFile:
    """A TOML file as values and as lines. `lines`: path of keys and indexes -> lines that set it, counted from 1."""

    name: str
    data: dict[str, Any]
    lines: dict[KeyPath, list[int]]

    def where(self, *path: str | int) -> str:
        """File and line of a key; of the nearest enclosing one when the key stands in an inline table."""
        for end in range(len(path), 0, -1):
            found = self.lines.get(path[:end]) or self.lines.get((*path[:end], 0))
            if found:
                return f"{self.name} line {found[-1]}"
        return self.name

    def flat(self) -> Iterator[tuple[str, Any, str]]:
        """(key, value, place) of every value, whatever section it stands in; in the order of the file."""
        return self._walk(self.data, ())

    def _walk(self, table: dict[str, Any], path: KeyPath) -> Iterator[tuple[str, Any, str]]:
        for key, value in table.items():
            if isinstance(value, dict):
                yield from self._walk(value, (*path, key))
            else:
                yield key, value, self.where(*path, key)


def read_text(path: Path, *, what: str) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} is not UTF-8 text (byte {error.start})", where=str(path), fix="save it in the encoding UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}", where=str(path)) from error


def read_toml(path: Path, *, what: str = "the file") -> TomlFile:
    """Read a TOML file. Raises UserError with the line for syntax errors and for keys given twice."""
    text = read_text(path, what=what).replace("\r\n", "\n")
    lines = key_lines(text)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _decode_error(str(error), name=str(path), lines=lines, text=text) from error
    return TomlFile(name=str(path), data=data, lines=lines)


def _decode_error(message: str, *, name: str, lines: dict[KeyPath, list[int]], text: str) -> UserError:
    for path, found in lines.items():
        if len(found) > 1 and ("overwrite" in message or "twice" in message or "mutate" in message):
            key = ".".join(str(part) for part in path if isinstance(part, str))
            numbers = f"{', '.join(map(str, found[:-1]))} and {found[-1]}"
            return UserError(f"{key} is given twice", where=f"{name} lines {numbers}", fix="remove one of them")
    match = _AT_LINE.search(message)
    sentence = _AT_LINE.sub("", message)
    if match is None:
        return UserError(f"this is not TOML: {sentence}", where=name)
    line = int(match.group(1))
    content = text.split("\n")[line - 1].strip()
    fix = "texts need quotes, true and false are written small, numbers have no unit"
    if "\\" in content:
        fix = "a backslash needs single quotes around the text, as in 'C:\\images', or write / instead"
    return UserError(f"this is not TOML: {sentence}: {content}", where=f"{name} line {line}", fix=fix)


def key_lines(text: str) -> dict[KeyPath, list[int]]:
    """The lines (from 1) on which each key and table header stands; tolerant of errors elsewhere in the text.

    Tables of an array are told apart by index: ("datasets", 0, "subsets", 1, "num_repeats").
    """
    lines: dict[KeyPath, list[int]] = {}
    array_index: dict[KeyPath, int] = {}
    current: KeyPath = ()
    position, line = 0, 1
    while position < len(text):
        header = _HEADER.match(text, position)
        assignment = None if header else _ASSIGNMENT.match(text, position)
        if header:
            current = _open_table(_parts(header.group(2)), array_index, is_array=header.group(1) == "[[")
            lines.setdefault(current, []).append(line)
        elif assignment:
            lines.setdefault((*current, *_parts(assignment.group(1))), []).append(line)
        start = assignment.end() if assignment else header.end() if header else position
        end = _end_of_value(text, start)
        line += text.count("\n", position, end)
        position = end
    return lines


def _open_table(parts: KeyPath, array_index: dict[KeyPath, int], *, is_array: bool) -> KeyPath:
    path: KeyPath = ()
    for number, part in enumerate(parts, start=1):
        path = (*path, part)
        if is_array and number == len(parts):
            array_index[path] = array_index.get(path, -1) + 1
        if path in array_index:
            path = (*path, array_index[path])
    return path


def _parts(dotted: str) -> KeyPath:
    return tuple(
        json.loads(part) if part.startswith('"') and "\\" not in part else part.strip("'\"")
        for part in re.findall(_KEY_PART, dotted)
    )


def _end_of_value(text: str, position: int) -> int:
    """The position after the newline that ends the value starting at `position`; arrays and texts may span lines."""
    depth = 0
    while position < len(text):
        character = text[position]
        if character in "\"'":
            position = _end_of_string(text, position)
            continue
        if character == "#":
            newline = text.find("\n", position)
            position = len(text) if newline < 0 else newline
            continue
        depth += (character in "[{") - (character in "]}")
        position += 1
        if character == "\n" and depth <= 0:
            return position
    return position


def _end_of_string(text: str, position: int) -> int:
    quote = text[position]
    triple = quote * 3
    closing = triple if text.startswith(triple, position) else quote
    position += len(closing)
    while position < len(text) and not text.startswith(closing, position):
        if len(closing) == 1 and text[position] == "\n":
            return position  # an unclosed text: leave the newline to the caller
        position += 2 if quote == '"' and text[position] == "\\" else 1
    return min(len(text), position + len(closing))


def toml_value(value: Any) -> str:
    """One value as TOML: bool, int, float, str, a resolution, or a list or tuple of these."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Size):
        return f'"{value.w},{value.h}"'
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    assert isinstance(value, (list, tuple)), f"no TOML form for {value!r}"
    return f"[{', '.join(toml_value(item) for item in value)}]"

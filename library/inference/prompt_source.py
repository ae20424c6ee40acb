"""Where prompt lines come from, and errors that point at a place in one. No torch."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.errors import Problem, UserError

_BEFORE, _AFTER = 48, 24  # letters of a line that an error shows on both sides of the place


@dataclass(frozen=True)
class PromptLine:
    """A line of text and where it stands, such as "prompts.txt line 3"."""

    text: str
    where: str = "prompt"

    def problem(self, what: str, start: int, end: int | None = None, *, fix: str = "") -> Problem:
        """A problem with text[start:end], shown as the line with carets under that place."""
        return Problem(what, f"{self.where}\n{caret(self.text, start, end)}", fix)

    def error(self, what: str, start: int, end: int | None = None, *, fix: str = "") -> UserError:
        """The same as an error to raise."""
        return UserError.from_problems([self.problem(what, start, end, fix=fix)])


def caret(text: str, start: int, end: int | None = None, *, indent: int = 4) -> str:
    """Two lines: the part of the text around start:end, and carets (at least one) under it.

    Wide letters take two columns, marks that combine none; what does not print becomes a space.
    """
    end = max(start + 1, start + 1 if end is None else end)
    first, last = max(0, start - _BEFORE), min(len(text), max(start + 1, min(end, start + _BEFORE)) + _AFTER)
    lead, trail = "…" if first else "", "…" if last < len(text) else ""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[first:last])
    place = start - first
    marked = shown[place : place + end - start]
    under = " " * (len(lead) + _columns(shown[:place])) + "^" * max(1, _columns(marked))
    margin = " " * indent
    return f"{margin}{lead}{shown}{trail}\n{margin}{under}"


def _columns(text: str) -> int:
    widths = (2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
    return sum(
        0 if unicodedata.category(letter) in ("Mn", "Me") else width for letter, width in zip(text, widths, strict=True)
    )


def file_lines(path: Path, *, kind: str = "prompt file") -> list[PromptLine]:
    """The lines of a UTF-8 text file, stripped, with their numbers; blank ones and those that start with # are left
    out.

    Raises UserError when the file cannot be read.
    """
    lines = (
        PromptLine(line.strip(), f"{path} line {number}")
        for number, line in enumerate(read_text(path, kind=kind).splitlines(), start=1)
    )
    return [line for line in lines if line.text and not line.text.startswith("#")]


def prompt_lines(from_file: str | None, prompt: str | None) -> list[PromptLine]:
    """What a run is to draw before anyone is asked: the lines of the file, else the prompt, else nothing.

    Raises UserError when the file cannot be read or holds no prompt.
    """
    if not from_file:
        return [] if prompt is None else [PromptLine(prompt.strip(), "--prompt")]
    lines = file_lines(Path(from_file))
    if not lines:
        raise UserError("the prompt file holds no prompts", from_file, "write one prompt per line")
    return lines


def read_text(path: Path, *, kind: str = "prompt file") -> str:
    """The text of a UTF-8 file, with or without a byte order mark; UserError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"the {kind} does not exist", str(path), "check the path") from None
    except OSError as error:
        raise UserError(f"the {kind} cannot be read ({error.strerror})", str(path)) from None
    except UnicodeDecodeError:
        raise UserError(f"the {kind} is not UTF-8", str(path), "save it as UTF-8") from None


def distinct(problems: Sequence[Problem]) -> list[Problem]:
    """Problems in order, each once."""
    return list(dict.fromkeys(problems))

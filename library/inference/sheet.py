"""Many pictures in one, in rows and columns with labels. Sides are in pixels. No torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from library.sizes import Size

GAP = 4
EMPTY = 64
"""Side of a row or a column without pictures."""
PAPER, INK = (255, 255, 255), (0, 0, 0)

Cells = Sequence[Sequence[Size | None]]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Look:
    """Room for labels: `margin` on the left for rows, `head` for columns, above it `title`; the font and its lines."""

    margin: int
    head: int
    font: int
    line: int
    title: int = 0


@dataclass(frozen=True)
class Labels:
    """What is written beside the rows, above the columns, and above everything."""

    rows: Sequence[str]
    columns: Sequence[str]
    title: str = ""


def draw_sheet(cells: Cells, picture: Callable[[int, int], Image.Image], *, labels: Labels, look: Look) -> Image.Image:
    """Pictures in rows and columns; those that are None leave their place blank.

    cells: the size of each picture; picture: fetches the one in a row and a column, at this size. A label that is too
    long for its room is wrapped and then cut; that of a head with one line is not wrapped.
    """
    widths, heights = _sides(cells)
    sheet = Image.new("RGB", sheet_size(cells, look), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(look.font)

    def write(text: str, left: int, top: int, width: float, height: int) -> None:
        most = max(height // look.line, 1)
        lines = fitted(text, font, width, most) if width else [text]
        pen.multiline_text((left, top), "\n".join(lines), INK, font, spacing=look.line - look.font)

    if look.title:
        write(labels.title, GAP, GAP, sheet.width - 2 * GAP, look.title - GAP)
    room = look.head - GAP
    lefts = list(_starts(look.margin, widths))
    for label, left, width in zip(labels.columns, lefts, widths, strict=True):
        write(label, left, look.title + GAP, width if room >= 2 * look.line else 0, room)
    for row, (top, height) in enumerate(zip(_starts(look.title + look.head, heights), heights, strict=True)):
        write(labels.rows[row], GAP, top, look.margin - 2 * GAP, height)
        for column, left in enumerate(lefts):
            if cells[row][column] is not None:
                sheet.paste(picture(row, column), (left, top))
    return sheet


def sheet_size(cells: Cells, look: Look) -> Size:
    """How large a sheet is."""
    widths, heights = _sides(cells)
    width, height = sum(widths) + GAP * len(widths), sum(heights) + GAP * len(heights)
    return Size(look.margin + width, look.title + look.head + height)


def fitted(text: str, font: Font, width: float, most: int) -> list[str]:
    """The text in at most `most` lines no wider than `width`; what does not fit is cut and ends in an ellipsis."""
    lines = list(wrapped(text, font, width))
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: most - 1], last + "..."]


def wrapped(text: str, font: Font, width: float) -> Iterator[str]:
    """Lines of whole words that are no wider than `width`; a word that is goes over several lines. At least one."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            yield line
            longer = word
        while len(longer) > 1 and font.getlength(longer) > width:
            end = _letters_within(longer, font, width)
            yield longer[:end]
            longer = longer[end:]
        line = longer
    yield line


def _letters_within(text: str, font: Font, width: float) -> int:
    """How many letters of a text a line holds, at least one."""
    return max(bisect_right(range(len(text)), width, key=lambda end: font.getlength(text[:end])) - 1, 1)


def _sides(cells: Cells) -> tuple[list[int], list[int]]:
    """The widths of the columns and the heights of the rows."""
    columns = list(zip(*cells, strict=True))
    widths = [max((size.w for size in column if size), default=EMPTY) for column in columns]
    return widths, [max((size.h for size in row if size), default=EMPTY) for row in cells]


def _starts(first: int, lengths: Sequence[int]) -> Iterator[int]:
    for length in lengths:
        yield first
        first += length + GAP

"""Contact sheets on disk, made of the pictures there: as large as the format can hold, else smaller, else several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageFont

from library.inference.grid import PROMPTS, Sheet
from library.inference.sheet import GAP, Cells, Labels, Look, draw_sheet, sheet_size, wrapped
from library.inference.writer import PARAMETERS, longest_side, misfit, save_picture
from library.log import get_logger
from library.sizes import Size

logger = get_logger(__name__)

MOST_PIXELS = 80_000_000
"""Of a sheet: beyond about 89 million, readers warn of it or refuse it."""
SMALLEST = 96
"""Pixels of the longest side of a picture on a sheet; rather than smaller ones there are several sheets."""
_SHRINK = 0.9
_A1111_AXES = {
    "seeds": "Seed", "steps": "Steps", "scale": "CFG Scale", "sampler": "Sampler", "eta": "Eta", "size": "Size",
    PROMPTS: "Prompt S/R",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Some rows and columns of a sheet, and by what its pictures are scaled."""

    rows: range
    columns: range
    scale: float


def write_sheet(sheet: Sheet, files: Sequence[Path], path: Path, *, quality: int | None = None) -> list[Path]:
    """Draw a sheet of the pictures' files; a sheet in several parts has path_1, path_2 and so on. Returns the paths.

    Its text (`parameters`) is that of its first picture with the axes, as A1111 writes them.
    """
    sizes = [[_size_of(files[number]) for number in row] for row in sheet.cells]
    longest = longest_side(path.suffix)
    parts = list(parts_of(sizes, Labels(sheet.rows, sheet.columns, sheet.title), longest))
    if len(parts) > 1:
        logger.info("the grid is too large for one picture: it becomes %d", len(parts))
    written = []
    for number, part in enumerate(parts, start=1):
        if part.scale < 1:
            logger.info("the pictures of the grid are scaled by %.2f, so that it stays readable", part.scale)
        name = path if len(parts) == 1 else path.with_stem(f"{path.stem}_{number}")
        labels = _cut(Labels(sheet.rows, sheet.columns, sheet.title), part)
        cells = _scaled(sizes, part)

        def picture(row: int, column: int, part: Part = part, cells: Cells = cells) -> Image.Image:
            with Image.open(files[sheet.cells[part.rows[row]][part.columns[column]]]) as drawn:
                return drawn.convert("RGB").resize(cells[row][column] or drawn.size, Image.Resampling.LANCZOS)

        drawn = draw_sheet(cells, picture, labels=labels, look=look_of(cells, labels))
        text = _text(files[sheet.cells[part.rows[0]][part.columns[0]]], sheet, labels)
        if misfit(name.name, Size(*drawn.size), text):  # only the text can be too long now
            text = ""
        save_picture(drawn, name, {PARAMETERS: text} if text else {}, quality=quality)
        written.append(name)
    return written


def parts_of(sizes: Sequence[Sequence[Size]], labels: Labels, longest: int | None) -> Iterator[Part]:
    """The fewest parts whose sides are at most `longest`, and whose pictures are as large as they can be.

    sizes: those of the pictures, in rows and columns.
    """
    yield from _parts(sizes, labels, longest, range(len(sizes)), range(len(sizes[0])))


def _parts(
    sizes: Sequence[Sequence[Size]], labels: Labels, longest: int | None, rows: range, columns: range
) -> Iterator[Part]:
    side = max(max(sizes[row][column]) for row in rows for column in columns)
    scale = 1.0
    while scale == 1.0 or side * scale >= SMALLEST:
        part = Part(rows, columns, scale)
        cells = _scaled(sizes, part)
        size = sheet_size(cells, look_of(cells, _cut(labels, part)))
        if (longest is None or max(size) <= longest) and size.w * size.h <= MOST_PIXELS:
            yield part
            return
        scale *= _SHRINK
    assert len(rows) > 1 or len(columns) > 1, "a picture that a format holds fits a sheet of its own"
    for half in _halves(rows) if len(rows) >= len(columns) else [rows]:
        for other in _halves(columns) if len(rows) < len(columns) else [columns]:
            yield from _parts(sizes, labels, longest, half, other)


def look_of(cells: Cells, labels: Labels) -> Look:
    """Letters that can be read beside pictures of this size, and the room that labels need, within limits."""
    sides = [max(size) for row in cells for size in row if size]
    letter = min(max(max(sides) // 24, 12), 40)
    line = round(letter * 1.3)
    font = ImageFont.load_default(letter)
    margin = min(max(font.getlength(label) for label in labels.rows), 16 * letter)
    widths = [max(size.w for size in column if size) for column in zip(*cells, strict=True)]
    lines = max(len(list(wrapped(text, font, width))) for text, width in zip(labels.columns, widths, strict=True))
    look = Look(round(margin) + 2 * GAP + 1, min(lines, 5) * line + 2 * GAP, letter, line)
    if not labels.title:
        return look
    whole = sheet_size(cells, look)
    lines = min(len(list(wrapped(labels.title, font, whole.w - 2 * GAP))), 4)
    return replace(look, title=lines * line + 2 * GAP)


def _scaled(sizes: Sequence[Sequence[Size]], part: Part) -> list[list[Size | None]]:
    return [
        [Size(*(max(round(side * part.scale), 1) for side in sizes[row][column])) for column in part.columns]
        for row in part.rows
    ]


def _cut(labels: Labels, part: Part) -> Labels:
    rows, columns = [labels.rows[row] for row in part.rows], [labels.columns[column] for column in part.columns]
    return Labels(rows, columns, labels.title)


def _halves(whole: range) -> list[range]:
    middle = (len(whole) + 1) // 2
    return [whole[:middle], whole[middle:]]


def _size_of(path: Path) -> Size:
    with Image.open(path) as picture:
        return Size(*picture.size)


def _text(first: Path, sheet: Sheet, labels: Labels) -> str:
    from library.inference.picture_text import texts_of

    axes = []
    for letter, name, values in (("X", sheet.axes[1], labels.columns), ("Y", sheet.axes[0], labels.rows)):
        plain = ", ".join(value.removeprefix(f"{name.removesuffix('s')} ").removeprefix(f"{name} ") for value in values)
        plain = plain.replace("\\", "\\\\").replace('"', '\\"')
        axes.append(f'{letter} Type: {_A1111_AXES.get(name, name)}, {letter} Values: "{plain}"')
    return f"{texts_of(first).get(PARAMETERS, '')}, Script: X/Y/Z plot, {', '.join(axes)}"

"""All sample pictures of a run in one: a row for each prompt, a column for each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from library.inference.sheet import Labels, Look, draw_sheet
from library.io.atomic import atomic_path
from library.sizes import Size

CELL = 256
"""Longest side of a picture on the sheet, in pixels."""
MARGIN, HEAD, LINE, FONT = 200, 24, 18, 14
MAX_COLUMNS = 60
"""Of more times, as many are shown at even distances, the first and the last among them."""


class Place(NamedTuple):
    """Where a picture belongs: the optimizer steps done when it was drawn, and its prompt's number (from 0)."""

    step: int
    prompt: int

    def text(self) -> dict[str, str]:
        """The text chunks of a PNG that tell its place."""
        return {"training-step": str(self.step), "prompt-number": str(self.prompt)}


def place_of(picture: Image.Image) -> Place | None:
    """What the text chunks of a PNG say about its place; None for other pictures."""
    try:
        return Place(int(picture.info["training-step"]), int(picture.info["prompt-number"]))
    except (KeyError, ValueError, TypeError):
        return None


@dataclass
class ContactSheet:
    """The sheet `{prefix}grid.png` in `folder`, made of this run's pictures there.

    prefix: how the names of the run's pictures begin. prompts: what to write beside the rows.
    """

    folder: Path
    prefix: str
    prompts: Sequence[str]
    _small: dict[Place, Image.Image] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where the sheet is written."""
        return self.folder / f"{self.prefix}grid.png"

    def take_up(self, last_step: int) -> None:
        """Start with the pictures that a resumed run has drawn up to `last_step`; a new run starts with none."""
        if last_step == 0:
            return
        for path in sorted(self.folder.glob(f"{self.prefix}*.png")):
            try:
                with Image.open(path) as picture:
                    place = place_of(picture)
                    if place is not None and place.step <= last_step:
                        self.add(place, picture)
            except OSError:
                continue  # a picture that cannot be read leaves a blank cell

    def add(self, place: Place, picture: Image.Image) -> None:
        """Put a picture into its place; a later one takes the place of an earlier one."""
        if place.prompt < len(self.prompts):
            small = picture.convert("RGB")
            small.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            self._small[place] = small

    def write(self) -> None:
        """Draw the sheet and write it, atomically."""
        steps = thinned(sorted({place.step for place in self._small}), MAX_COLUMNS)
        if not steps:
            return
        rows = range(len(self.prompts))
        cells = [[self._size(Place(step, row)) for step in steps] for row in rows]
        labels = Labels(self.prompts, [f"step {step}" for step in steps])
        look = Look(MARGIN, HEAD, FONT, LINE)
        sheet = draw_sheet(cells, lambda row, column: self._small[Place(steps[column], row)], labels=labels, look=look)
        with atomic_path(self.path, durable=False) as temporary:
            sheet.save(temporary, format="PNG")

    def _size(self, place: Place) -> Size | None:
        return Size(*self._small[place].size) if place in self._small else None


def thinned(items: Sequence[int], most: int) -> list[int]:
    """At most `most` (2 or more) of the items at even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]

"""Weights of a network's blocks in merging (--lbws): what a list says about a module.

Source: block_lr.md section 3. A list names slots of the table BASE, IN00-IN11, MID, OUT00-OUT11 (26 places); SDXL's
U-Net has the slots up to IN08 and OUT08. What a list does not name is merged with weight 1.
"""

from __future__ import annotations

import json

from library.config.block_weights import MERGE_SLOTS
from library.errors import UserError
from networks._block_weights import slot_of


def slot_names() -> tuple[str, ...]:
    """The 26 names of the table."""
    return (
        "BASE",
        *(f"IN{index:02d}" for index in range(12)),
        "MID",
        *(f"OUT{index:02d}" for index in range(12)),
    )


class BlockWeights:
    """One model's weights; without a list every module has weight 1."""

    def __init__(self, values: tuple[float, ...] | None = None) -> None:
        assert values is None or len(values) in MERGE_SLOTS, values
        self.values = values
        self._by_slot = {} if values is None else dict(zip(MERGE_SLOTS[len(values)], values, strict=True))

    @classmethod
    def parse(cls, text: str, *, where: str = "--lbws") -> BlockWeights:
        """Read a list as sd-scripts takes it, "[1,0,0.5,...]", with or without brackets. Raises UserError."""
        try:
            values = json.loads(f"[{text.strip().removeprefix('[').removesuffix(']')}]")
        except ValueError:
            raise UserError(f"{text!r} is not a list of numbers", where, 'write it as "[1,1,0,...]"') from None
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise UserError(f"{text!r} holds something else than numbers", where, 'write it as "[1,1,0,...]"')
        if len(values) not in MERGE_SLOTS:
            raise UserError(
                f"a list has {len(values)} weights",
                where,
                f"give one of {', '.join(map(str, sorted(MERGE_SLOTS)))} weights, as docs/tools.md lists them",
            )
        return cls(tuple(float(value) for value in values))

    def __call__(self, name: str) -> float:
        """The weight of a module by sd-scripts' name; 1 for a name that is of no block."""
        try:
            return self._by_slot.get(slot_of(name), 1.0)
        except KeyError:
            return 1.0

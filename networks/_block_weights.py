"""Weights of a network's blocks in merging (--lbws): which slot a module belongs to, and what its weight is.

Source: block_lr.md section 3. A list names slots of the table BASE, IN00-IN11, MID, OUT00-OUT11 (26 places); SDXL's
U-Net has the slots up to IN08 and OUT08. What a list does not name is merged with weight 1.
"""

from __future__ import annotations

import json
import re

from library.errors import UserError

_MID, _OUT = 13, 14
SLOTS: dict[int, tuple[int, ...]] = {
    12: (0, 5, 6, 8, 9, _MID, *range(_OUT, _OUT + 6)),
    17: (0, 2, 3, 5, 6, 8, 9, _MID, *range(_OUT + 3, _OUT + 12)),
    20: (*range(10), _MID, *range(_OUT, _OUT + 9)),
    26: tuple(range(26)),
}
"""Length of a list -> the places in the table that its entries stand for."""

_BLOCK = re.compile(r"(?:^|_)(input_blocks|output_blocks)_(\d+)_")


def slot_names() -> tuple[str, ...]:
    """The 26 names of the table."""
    return (
        "BASE",
        *(f"IN{index:02d}" for index in range(12)),
        "MID",
        *(f"OUT{index:02d}" for index in range(12)),
    )


def slot_of(name: str) -> int | None:
    """The place in the table of a module by sd-scripts' name (SAI names in the U-Net); None for other names."""
    if "text_model_encoder_" in name:
        return 0
    if match := _BLOCK.search(name):
        return (1 if match[1] == "input_blocks" else _OUT) + int(match[2])
    if "_middle_block_" in name:
        return _MID
    if re.search(r"_unet_(time_embed|label_emb)_", name):
        return 1
    if re.search(r"_unet_out_\d", name):
        return _OUT + 9
    return None


class BlockWeights:
    """One model's weights; without a list every module has weight 1."""

    def __init__(self, values: tuple[float, ...] | None = None) -> None:
        assert values is None or len(values) in SLOTS, values
        self.values = values
        self._by_slot = {} if values is None else dict(zip(SLOTS[len(values)], values, strict=True))

    @classmethod
    def parse(cls, text: str, *, where: str = "--lbws") -> BlockWeights:
        """Read a list as sd-scripts takes it, "[1,0,0.5,...]", with or without brackets. Raises UserError."""
        try:
            values = json.loads(f"[{text.strip().removeprefix('[').removesuffix(']')}]")
        except ValueError:
            raise UserError(f"{text!r} is not a list of numbers", where, 'write it as "[1,1,0,...]"') from None
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise UserError(f"{text!r} holds something else than numbers", where, 'write it as "[1,1,0,...]"')
        if len(values) not in SLOTS:
            raise UserError(
                f"a list has {len(values)} weights",
                where,
                "give 12 or 20 (SDXL: BASE, IN.., MID, OUT..), 17 or 26, as docs/tools.md lists them",
            )
        return cls(tuple(float(value) for value in values))

    def __call__(self, name: str) -> float:
        """The weight of a module by sd-scripts' name."""
        slot = slot_of(name)
        return 1.0 if slot is None else self._by_slot.get(slot, 1.0)

"""The blocks of SDXL's U-Net and weights for them as texts: "1,0.5,..." with 26, 23, 20, 17 or 12 numbers.

Lists of 26 and shorter ones name places in the table BASE, IN00-IN11, MID, OUT00-OUT11, of which SDXL has IN00-IN08 and
OUT00-OUT08; BASE is the text encoders (and a checkpoint's VAE). Lists of 23 name the U-Net's blocks alone. Source:
block_lr.md §1 and §3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# The places of each list in the table of 26.
SLOTS: dict[int, tuple[int, ...]] = {
    26: tuple(range(26)),
    20: (0, *range(1, 10), 13, *range(14, 23)),
    12: (0, 5, 6, 8, 9, 13, *range(14, 20)),
}
# Merging also takes the list of SD 1.x, as sd-scripts does.
MERGE_SLOTS: dict[int, tuple[int, ...]] = {**SLOTS, 17: (0, 2, 3, 5, 6, 8, 9, 13, *range(17, 26))}
SLOT_NAMES = ("BASE", *(f"IN{n:02d}" for n in range(12)), "MID", *(f"OUT{n:02d}" for n in range(12)))
NUM_U_NET_BLOCKS = 23

_BASE, _EMBEDDINGS, _MIDDLE, _HEAD = 0, 1, 13, 23
_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)(?:[._](\d+))?(?:[._]|$)")
_FIRST_INDEX = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 10, "output_blocks": 13, "out": 22}


def u_net_block(path: str) -> int:
    """Index 0..22 of the block that an SAI module path or tensor key belongs to, with dots or underscores.

    0 is the time and size embedding, 1-9 the input blocks, 10-12 the middle block, 13-21 the output blocks, 22 the
    head. Raises KeyError for other names. Source: sd-scripts' per-block options (block_lr.md §1).
    """
    match = _BLOCK.match(path)
    if match is None:
        raise KeyError(path)
    kind, number = match[1], match[2]
    if not kind.endswith(("blocks", "block")):
        return _FIRST_INDEX[kind]
    if number is None:
        raise KeyError(path)
    return _FIRST_INDEX[kind] + int(number)


def slot_of_block(block: int | None) -> int:
    """Place 0..25 of a U-Net block in the table of 26; BASE for None, which is what belongs to no block of the U-Net.

    The embeddings count as IN00 and the head as OUT09, as sd-scripts has it.
    """
    if block is None:
        return _BASE
    if block == 0:
        return _EMBEDDINGS
    if block < 10:
        return block
    if block < 13:
        return _MIDDLE
    return block + 1 if block < NUM_U_NET_BLOCKS - 1 else _HEAD


def weight_of_block(block: int | None, weights: Sequence[float]) -> float:
    """The weight of a block (None: outside the U-Net) by a list of any length; 1 where it has no place for the block.

    No weights at all are 1 everywhere.
    """
    if not weights:
        return 1.0
    if len(weights) == NUM_U_NET_BLOCKS:
        return 1.0 if block is None else weights[block]
    slots, slot = MERGE_SLOTS[len(weights)], slot_of_block(block)
    return weights[slots.index(slot)] if slot in slots else 1.0


def parse_block_weights(text: str, known: Mapping[int, tuple[int, ...]] = SLOTS) -> tuple[float, ...]:
    """The numbers of a text, with or without brackets; () for an empty one. ValueError says what is wrong with it.

    known: the lists by length, `SLOTS` or `MERGE_SLOTS`; 23 numbers are always taken.
    """
    text = text.strip()
    if not text:
        return ()
    try:
        weights = tuple(float(part) for part in text.removeprefix("[").removesuffix("]").split(","))
    except ValueError:
        raise ValueError(f"holds {text!r}, which is not a list of numbers such as 1,0.5,0") from None
    if any(abs(weight) == float("inf") or weight != weight for weight in weights):
        raise ValueError(f"holds {text!r}: every weight must be finite")
    if len(weights) in known or len(weights) == NUM_U_NET_BLOCKS:
        return weights
    if len(weights) in MERGE_SLOTS:
        raise ValueError("has 17 weights, which is the form for SD 1.x; SDXL's have 12, 20 or 26")
    counts = ", ".join(str(count) for count in sorted(known))
    raise ValueError(f"has {len(weights)} weights: give one of {counts} (with the text encoders first), or 23")

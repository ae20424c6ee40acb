"""Block weights of merges: lists of 12, 17, 20, 23 or 26 numbers, and the slot of a tensor of a single file.

Slots are positions in a table of 26, BASE, IN00-IN11, MID, OUT00-OUT11 (block_lr.md section 3); SDXL uses IN00-IN08 and
OUT00-OUT08. A list of 23 names the blocks of `--block_lr` instead: 0 time and size embedding, 1-9 input, 10-12 middle,
13-21 output, 22 head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from library.config.block_weights import MERGE_SLOTS
from library.errors import UserError
from library.models.arch import PREFIXES
from library.models.keymaps.unet import NUM_BLOCKS, block_index

_MID = 13


def parse_block_weights(text: str, *, where: str) -> tuple[float, ...]:
    """The numbers of one list, as JSON or separated by commas. Raises UserError for another count or for texts."""
    try:
        found = json.loads(text if text.strip().startswith("[") else f"[{text}]")
        weights = tuple(float(each) for each in found)
    except (ValueError, TypeError) as error:
        raise UserError(f"{text!r} is no list of numbers ({error})", where, "write [1,1,0.5,…]") from None
    if len(weights) not in (*MERGE_SLOTS, NUM_BLOCKS):
        counts = ", ".join(map(str, sorted((*MERGE_SLOTS, NUM_BLOCKS))))
        raise UserError(f"the list has {len(weights)} block weights", where, f"give one of {counts}")
    return weights


def block_weight(key: str, weights: Sequence[float]) -> float:
    """The weight of a single-file key; 1 for what a list of this length does not reach.

    Text encoders and VAE are BASE, which a list of 23 does not have.
    """
    if len(weights) == NUM_BLOCKS:
        return weights[block_index(key.removeprefix(PREFIXES["unet"]))] if key.startswith(PREFIXES["unet"]) else 1.0
    slots = MERGE_SLOTS[len(weights)]
    slot = _slot(key)
    return weights[slots.index(slot)] if slot in slots else 1.0


def _slot(key: str) -> int:
    """Position 0..25 in the table of 26: embeddings count with IN00, the head with OUT09, as sd-scripts has them."""
    if not key.startswith(PREFIXES["unet"]):
        return 0
    index = block_index(key.removeprefix(PREFIXES["unet"]))
    if index == 0:
        return 1
    if index < 10:
        return index
    if index < 13:
        return _MID
    return index + 1 if index < NUM_BLOCKS - 1 else 23

"""Weights of a model's blocks, by the module names of network files (block_lr.md §3)."""

from collections.abc import Sequence

from library.config.block_weights import NUM_U_NET_BLOCKS, SLOTS
from networks._keys import PARTS

_IN, _MIDDLE, _OUT = 1, 13, 14  # where IN00, MID and OUT00 stand in the table of 26
_HEAD = 23


def slot_of(name: str) -> int:
    """Place of a module in the table BASE, IN00-IN11, MID, OUT00-OUT11 (0..25); 0 for the text encoders.

    name: as in a file, `lora_unet_input_blocks_4_1_...`. The time and size embeddings count as IN00 and the head as
    OUT09, as sd-scripts has it. Raises KeyError for a name that is of no part of SDXL.
    """
    part, rest = _split(name)
    if part != "unet":
        return 0
    kind, number = rest.split("_")[0], _number(rest)
    if kind in ("time", "label"):
        return _IN
    if kind == "input" and number is not None:
        return _IN + number
    if kind == "middle":
        return _MIDDLE
    if kind == "output" and number is not None:
        return _OUT + number
    if kind == "out":
        return _HEAD
    raise KeyError(name)


def u_net_block_of(name: str) -> int | None:
    """Index 0..22 of the U-Net's block that a module is in (block_lr.md §1), None for the text encoders."""
    part, rest = _split(name)
    if part != "unet":
        return None
    slot, number = slot_of(name), _number(rest)
    if rest.startswith(("time", "label")):
        return 0
    if slot == _HEAD and rest.startswith("out_"):
        return 22
    if slot == _MIDDLE:
        return 10 + (number or 0)
    return slot if slot < _MIDDLE else slot - 1


def block_factor(name: str, weights: Sequence[float]) -> float:
    """The weight of a module's block: 1 without weights, and where a short list has no place for the block.

    weights: 26, 20 or 12 in the order of `SLOTS`, or 23 for the U-Net's blocks alone.
    """
    if not weights:
        return 1.0
    if len(weights) == NUM_U_NET_BLOCKS:
        block = u_net_block_of(name)
        return 1.0 if block is None else weights[block]
    slots = SLOTS[len(weights)]
    slot = slot_of(name)
    return weights[slots.index(slot)] if slot in slots else 1.0


def _split(name: str) -> tuple[str, str]:
    """(part, the rest of the name after its prefix)."""
    _, part, rest = [*name.split("_", 2), "", ""][:3]
    if part not in PARTS or not rest:
        raise KeyError(name)
    return part, rest


def _number(rest: str) -> int | None:
    """The first number of `input_blocks_4_1_...`."""
    return next((int(piece) for piece in rest.split("_") if piece.isdigit()), None)

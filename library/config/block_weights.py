"""Weights of a model's blocks as texts: "1,0.5,..." with 26, 23, 20 or 12 numbers (block_lr.md §1 and §3)."""

from __future__ import annotations

# The places of the shorter lists in the table BASE, IN00-IN11, MID, OUT00-OUT11. BASE is the text encoders.
SLOTS: dict[int, tuple[int, ...]] = {
    26: tuple(range(26)),
    20: (0, *range(1, 10), 13, *range(14, 23)),
    12: (0, 5, 6, 8, 9, 13, *range(14, 20)),
}
# Merging also takes the list of SD 1.x, as sd-scripts does.
MERGE_SLOTS: dict[int, tuple[int, ...]] = {**SLOTS, 17: (0, 2, 3, 5, 6, 8, 9, 13, *range(17, 26))}
NUM_U_NET_BLOCKS = 23


def parse_block_weights(text: str) -> tuple[float, ...]:
    """The numbers of a text; () for an empty one, which means 1 everywhere. ValueError says what is wrong with it."""
    if not text.strip():
        return ()
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"holds {text!r}, which is not a list of numbers such as 1,0.5,0") from None
    if any(abs(weight) == float("inf") or weight != weight for weight in weights):
        raise ValueError(f"holds {text!r}: every weight must be finite")
    if len(weights) == 17:
        raise ValueError("has 17 weights, which is the form for SD 1.x; SDXL's have 12, 20 or 26")
    if len(weights) not in (*SLOTS, NUM_U_NET_BLOCKS):
        raise ValueError(f"has {len(weights)} weights: give 12, 20 or 26 (with the text encoders first), or 23")
    return weights

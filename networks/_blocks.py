"""The 23 blocks of SDXL's U-Net, as network_args number them, and rates per block (block_lr.md §2); torch-free."""

import math
from collections.abc import Callable, Sequence

from library.config.block_weights import u_net_block

DOWN, MID, UP = 9, 3, 9

# network_args key -> how many weights it has.
WEIGHT_COUNTS = {"down_lr_weight": DOWN, "mid_lr_weight": MID, "up_lr_weight": UP}


def block_index(name: str) -> int | None:
    """The block 0..22 of a U-Net module by its name in files (`lora_unet_input_blocks_4_1_…` is 5); None: no block."""
    try:
        return u_net_block(name.split("_unet_", 1)[-1])
    except KeyError:
        return None


def _sine(i: int) -> float:
    return math.sin(math.pi / 2 * i / 8)


def _linear(i: int) -> float:
    return i / 8


# Shapes over the nine blocks i = 0..8 of one side.
PRESETS: dict[str, Callable[[int], float]] = {
    "sine": _sine,
    "cosine": lambda i: _sine(8 - i),
    "linear": _linear,
    "reverse_linear": lambda i: _linear(8 - i),
    "zeros": lambda i: 0.0,
}


def parse_weights(text: str, count: int) -> tuple[float, ...]:
    """`count` weights from "0.5,1,0", from one number, or (for nine) from a preset with or without offset: "sine+.25".

    An empty item is 0, a list that is too short goes on with 1.0. Raises ValueError for anything else.
    """
    name, plus, offset = (part.strip() for part in text.partition("+"))
    if name in PRESETS and "," not in text:
        if count != 9:
            raise ValueError("takes no preset: give up to 3 numbers")
        start = _weight(offset) if plus else 0.0
        return tuple(PRESETS[name](i) + start for i in range(count))
    values = [_weight(item) if item.strip() else 0.0 for item in text.split(",")]
    if len(values) > count:
        raise ValueError(f"has {len(values)} values, SDXL has {count} blocks there")
    return (*values, *[1.0] * (count - len(values)))


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f'must be numbers, or one of {", ".join(PRESETS)} with or without "+offset"') from None
    if not 0 <= value < math.inf:
        raise ValueError("must not be negative")
    return value


def block_weights(
    down: Sequence[float] | None, mid: Sequence[float] | None, up: Sequence[float] | None, *, threshold: float
) -> tuple[float, ...] | None:
    """The factor of each block's learning rate, 23 of them; None when no weights are given.

    Weights that are not above `threshold` are 0: such a block is not trained. Blocks 0 and 22 have 1.0.
    """
    if down is None and mid is None and up is None:
        return None
    inner = [*(down or [1.0] * DOWN), *(mid or [1.0] * MID), *(up or [1.0] * UP)]
    return (1.0, *(weight if weight > threshold else 0.0 for weight in inner), 1.0)

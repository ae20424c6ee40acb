"""Weights of a model's blocks, by the module names of network files (block_lr.md §1 and §3)."""

from collections.abc import Sequence

from library.config.block_weights import u_net_block, weight_of_block
from networks._keys import PARTS


def block_of(name: str) -> int | None:
    """Index 0..22 of the U-Net block of a module, by its name as in a file (`lora_unet_input_blocks_4_1_…` is 5).

    None for the text encoders. Raises KeyError for a name that is of no part of SDXL.
    """
    _, part, rest = [*name.split("_", 2), "", ""][:3]
    if part not in PARTS or not rest:
        raise KeyError(name)
    return u_net_block(rest) if part == "unet" else None


def block_factor(name: str, weights: Sequence[float]) -> float:
    """The weight of a module's block, as `weight_of_block` has it; 1 for a name that is of no block."""
    try:
        return weight_of_block(block_of(name), weights) if weights else 1.0
    except KeyError:
        return 1.0

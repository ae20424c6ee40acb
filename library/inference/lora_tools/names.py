"""Module names of LoRA files without a model at hand: diffusers' U-Net names become sd-scripts'."""

from __future__ import annotations

from functools import cache

from library.models.keymaps.unet import unet_keymap

_UNETS = ("lora_unet_", "oft_unet_")


@cache
def _diffusers_starts() -> tuple[tuple[str, str], ...]:
    """(start of a diffusers name, start of the SAI name), dots as underscores, the longest first."""
    pairs = [(rule.b[0].replace(".", "_"), rule.a[0].replace(".", "_")) for rule in unet_keymap().rules]
    return tuple(sorted(pairs, key=lambda pair: -len(pair[0])))


def sd_scripts_name(name: str) -> str:
    """sd-scripts' name of a module, "lora_unet_down_blocks_1_..." as "lora_unet_input_blocks_4_..."; others as is."""
    prefix = next((prefix for prefix in _UNETS if name.startswith(prefix)), None)
    if prefix is None:
        return name
    path = name[len(prefix) :]
    for theirs, ours in _diffusers_starts():
        if path == theirs or path.startswith(theirs + "_"):
            return prefix + ours + path[len(theirs) :]
    return name


def part_of(name: str) -> str:
    """The part of the model that a module's name tells of: "te1", "te2", "unet", or the name's first word."""
    for start, part in (
        ("lora_te1_", "te1"),
        ("lora_te2_", "te2"),
        ("lora_te_", "te"),
        ("lora_unet_", "unet"),
        ("oft_unet_", "unet"),
        ("text_encoder_2.", "te2"),
        ("text_encoder.", "te1"),
        ("unet.", "unet"),
    ):
        if name.startswith(start):
            return part
    return name.partition(".")[0].partition("_")[0]

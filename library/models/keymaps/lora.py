"""Module names in LoRA files: sd-scripts', the same with diffusers' names, and diffusers' own dotted names.

A module is held as its part ("unet", "te1", "te2") and its path in diffusers or transformers, with dots. Files write
the path in three ways (lora_format.md section 1):

    sd-scripts            lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q, lora_te1_text_model_encoder_...
    sd-scripts-diffusers  lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q, lora_te1_...
    diffusers             unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q, text_encoder....

Underscores are turned back into dots with the list of names that have an underscore themselves, so that no model is
needed and any size will do.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from library.models.keymaps.text import with_text_model
from library.models.keymaps.unet import diffusers_to_sai, sai_to_diffusers

LoraPart = Literal["unet", "te1", "te2"]
Naming = Literal["sd-scripts", "sd-scripts-diffusers", "diffusers"]

DOTTED_PREFIXES: dict[LoraPart, str] = {"te1": "text_encoder", "te2": "text_encoder_2", "unet": "unet"}
_PARTS: tuple[LoraPart, ...] = ("unet", "te1", "te2")

_COMPOUNDS = (
    "input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "in_layers", "out_layers",
    "emb_layers", "skip_connection",
    "down_blocks", "mid_block", "up_blocks", "time_embedding", "add_embedding", "linear_1", "linear_2", "conv_in",
    "conv_out", "conv_norm_out", "conv_shortcut", "time_emb_proj", "group_norm",
    "transformer_blocks", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out",
    "text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "layer_norm1",
    "layer_norm2", "final_layer_norm", "token_embedding", "position_embedding",
)  # fmt: skip
_PIECE = re.compile(rf"(?:{'|'.join(sorted(_COMPOUNDS, key=len, reverse=True))})(?=_|$)|[^_]+")
_SAI_HEADS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_DIFFUSERS_HEADS = (
    "down_blocks.", "mid_block.", "up_blocks.", "time_embedding.", "add_embedding.", "conv_in", "conv_out",
    "conv_norm_out",
)  # fmt: skip
# Names of the days when diffusers kept LoRA in attention processors.
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora$|\.(to_[qkv]|to_out|[qkv]_proj|out_proj)_lora$")


class LoraModule(NamedTuple):
    """One adapted module: its part, and its dotted path in diffusers (U-Net) or, with text_model., transformers."""

    part: LoraPart
    path: str

    def named(self, naming: Naming) -> str:
        """The module's name in a file of that naming, without a tail such as `.alpha`."""
        if naming == "diffusers":
            return f"{DOTTED_PREFIXES[self.part]}.{self.path}"
        path = diffusers_to_sai(self.path) if naming == "sd-scripts" and self.part == "unet" else self.path
        return f"lora_{self.part}_{path}".replace(".", "_")


def parse_underscored(name: str) -> LoraModule | None:
    """The module of an sd-scripts name, with Stability's or diffusers' block names; None for any other name.

    LyCORIS leaves `text_model_` out of the first text encoder's names; such names are understood.
    """
    for part in _PARTS:
        head = f"lora_{part}_"
        if name.startswith(head):
            return _module(part, ".".join(_PIECE.findall(name[len(head) :])))
    return None


def parse_dotted(name: str) -> LoraModule | None:
    """The module of a diffusers or PEFT name (`unet.…`, `text_encoder.…`, `base_model.model.…`); None for any other.

    PEFT's own adapters hold one model and do not say which: one that has U-Net names is the U-Net's.
    """
    name = name.removeprefix("base_model.model.")
    for part, head in DOTTED_PREFIXES.items():
        if name.startswith(head + "."):
            return _module(part, _without_processor(name[len(head) + 1 :]))
    return _module("unet", _without_processor(name)) if name.startswith(_DIFFUSERS_HEADS) else None


def _without_processor(path: str) -> str:
    found = _PROCESSOR.search(path)
    if found is None:
        return path
    layer = found[1] or found[2]
    return f"{path[: found.start()]}.{'to_out.0' if layer == 'to_out' else layer}"


def _module(part: LoraPart, path: str) -> LoraModule | None:
    if part != "unet":
        path = with_text_model(path)
        return LoraModule(part, path)
    if path.startswith(_SAI_HEADS):
        try:
            return LoraModule(part, sai_to_diffusers(path))
        except KeyError:
            return None
    if not path.startswith(_DIFFUSERS_HEADS):
        return None
    try:
        diffusers_to_sai(path)
    except KeyError:
        return None
    return LoraModule(part, path)

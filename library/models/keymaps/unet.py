"""U-Net names: Stability's single-file layout ("SAI") <-> diffusers, for tensor keys and module paths alike.

SDXL has two resnets per level, so every level takes three places in `input_blocks` and three in `output_blocks`; the
number of levels and the depth of the transformers are free, which is why the tiny model and the full one share the
table. Source of the table: the module structure of the two implementations.
"""

from functools import cache

from library.io.keymap import KeyMap, Rule, rename

NUM_LEVELS = 3
PLACES_PER_LEVEL = 3  # down: two resnets and a resampler; up: three resnets

_TOP = (
    rename("time_embed.0", "time_embedding.linear_1"),
    rename("time_embed.2", "time_embedding.linear_2"),
    rename("label_emb.0.0", "add_embedding.linear_1"),
    rename("label_emb.0.2", "add_embedding.linear_2"),
    rename("input_blocks.0.0", "conv_in"),
    rename("out.0", "conv_norm_out"),
    rename("out.2", "conv_out"),
    rename("middle_block.1", "mid_block.attentions.0"),
)
_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("emb_layers.1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
)


@cache
def unet_keymap(num_levels: int = NUM_LEVELS) -> KeyMap:
    """Layout A is the single file below `model.diffusion_model.`, layout B is diffusers."""
    rules = [
        *_TOP,
        *_resnet("middle_block.0", "mid_block.resnets.0"),
        *_resnet("middle_block.2", "mid_block.resnets.1"),
    ]
    for level in range(num_levels):
        down, up = 1 + PLACES_PER_LEVEL * level, PLACES_PER_LEVEL * level
        for index in range(2):
            rules += _resnet(f"input_blocks.{down + index}.0", f"down_blocks.{level}.resnets.{index}")
            rules.append(rename(f"input_blocks.{down + index}.1", f"down_blocks.{level}.attentions.{index}"))
        rules.append(rename(f"input_blocks.{down + 2}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
        for index in range(3):
            rules += _resnet(f"output_blocks.{up + index}.0", f"up_blocks.{level}.resnets.{index}")
            rules.append(rename(f"output_blocks.{up + index}.1", f"up_blocks.{level}.attentions.{index}"))
        rules.append(rename(f"output_blocks.{up + 2}.2", f"up_blocks.{level}.upsamplers.0"))
    return KeyMap(rules)


def diffusers_to_sai(name: str) -> str:
    """SAI name of a diffusers U-Net module path or tensor key; KeyError for what SDXL's U-Net does not have."""
    return _found(unet_keymap().name(name, reverse=True), name)


def sai_to_diffusers(name: str) -> str:
    """Diffusers name of an SAI U-Net module path or tensor key; KeyError for what SDXL's U-Net does not have."""
    return _found(unet_keymap().name(name), name)


def _resnet(sai: str, diffusers: str) -> list[Rule]:
    return [rename(f"{sai}.{theirs}", f"{diffusers}.{ours}") for theirs, ours in _RESNET]


def _found(name: str | None, asked: str) -> str:
    if name is None:
        raise KeyError(asked)
    return name

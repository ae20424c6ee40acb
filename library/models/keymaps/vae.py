"""VAE names: the LDM layout of single files and VAE files <-> diffusers."""

from functools import cache

from library.io.keymap import KeyMap, Rule, conv1x1, rename

NUM_LEVELS = 4
_RESNET = ("norm1", "conv1", "norm2", "conv2")
_ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
# Names that diffusers gave the same tensors before its attention classes were unified.
_OLD_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))


@cache
def vae_keymap(num_levels: int = NUM_LEVELS) -> KeyMap:
    """Layout A is LDM without `first_stage_model.`, layout B is diffusers.

    LDM counts the decoder's levels from the picture, diffusers from the latents.
    """
    rules = [rename("quant_conv", "quant_conv"), rename("post_quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        rules += [
            rename(f"{side}.conv_in", f"{side}.conv_in"),
            rename(f"{side}.norm_out", f"{side}.conv_norm_out"),
            rename(f"{side}.conv_out", f"{side}.conv_out"),
            *_resnet(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0"),
            *_resnet(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1"),
            *_attention(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"),
        ]
    for level in range(num_levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{num_levels - 1 - level}"
        for index in range(2):
            rules += _resnet(f"{down}.block.{index}", f"encoder.down_blocks.{level}.resnets.{index}")
        for index in range(3):
            rules += _resnet(f"{up}.block.{index}", f"decoder.up_blocks.{level}.resnets.{index}")
        rules.append(rename(f"{down}.downsample", f"encoder.down_blocks.{level}.downsamplers.0"))
        rules.append(rename(f"{up}.upsample", f"decoder.up_blocks.{level}.upsamplers.0"))
    return KeyMap(rules)


def modern_key(key: str) -> str:
    """A diffusers VAE key with today's attention names, out of a file of any age."""
    head, found, rest = key.partition(".attentions.0.")
    for old, new in _OLD_ATTENTION:
        if found and rest.startswith(old + "."):
            return head + found + new + rest[len(old) :]
    return key


def _resnet(ldm: str, diffusers: str) -> list[Rule]:
    same = [rename(f"{ldm}.{name}", f"{diffusers}.{name}") for name in _RESNET]
    return [*same, rename(f"{ldm}.nin_shortcut", f"{diffusers}.conv_shortcut")]


def _attention(ldm: str, diffusers: str) -> list[Rule]:
    rules = [rename(f"{ldm}.norm", f"{diffusers}.group_norm")]
    for theirs, ours in _ATTENTION:
        rules.append(conv1x1(f"{ldm}.{theirs}.weight", f"{diffusers}.{ours}.weight"))
        rules.append(rename(f"{ldm}.{theirs}.bias", f"{diffusers}.{ours}.bias"))
    return rules

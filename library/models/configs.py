"""Configurations of the four library classes (diffusers, transformers) for an architecture, and back."""

from collections.abc import Mapping
from typing import Any

from library.errors import UserError
from library.models.arch import LATENT_FACTOR, NUM_RES_BLOCKS, Facts, Part, SdxlArch, TextArch, UnetArch, VaeArch

SCALING_FACTOR = 0.13025  # of SDXL's latents
BOS_ID, EOS_ID = 49406, 49407
PAD_ID_1, PAD_ID_2 = EOS_ID, 0  # SDXL pads encoder 1 with the end token and encoder 2 with id 0 ("!")
NUM_SIZE_IDS = 6


def part_config(arch: SdxlArch, part: Part) -> dict[str, Any]:
    """Keyword arguments for the part's library class; the part must be in `arch`."""
    if part == "unet":
        assert arch.unet is not None and arch.text_encoder_2 is not None
        return _unet_config(arch.unet, arch.facts, pooled_width=arch.text_encoder_2.projection or 0)
    if part == "vae":
        assert arch.vae is not None
        return _vae_config(arch.vae, arch.facts)
    if part == "text_encoder_1":
        assert arch.text_encoder_1 is not None
        return _text_config(arch.text_encoder_1, arch.facts, hidden_act="quick_gelu", pad_id=PAD_ID_1)
    assert arch.text_encoder_2 is not None
    return _text_config(arch.text_encoder_2, arch.facts, hidden_act="gelu", pad_id=PAD_ID_2)


def arch_from_configs(configs: Mapping[Part, Mapping[str, Any]], *, where: str = "") -> SdxlArch:
    """The architecture that the config.json files of a diffusers folder describe.

    Parts that `configs` lacks are None. Raises UserError for configurations that are not SDXL's kind; whether the
    tensors agree is checked when they are loaded.
    """
    try:
        unet, vae = configs.get("unet"), configs.get("vae")
        facts = Facts(
            norm_groups=unet["norm_num_groups"] if unet else Facts.norm_groups,
            vae_norm_groups=vae["norm_num_groups"] if vae else Facts.vae_norm_groups,
            head_dim=_head_dim(configs),
            sample_size=unet["sample_size"] if unet else Facts.sample_size,
        )
        text_1, text_2 = configs.get("text_encoder_1"), configs.get("text_encoder_2")
        return SdxlArch(
            unet=_unet_arch(unet) if unet else None,
            text_encoder_1=_text_arch(text_1, projection=None) if text_1 else None,
            text_encoder_2=_text_arch(text_2, projection=text_2["projection_dim"]) if text_2 else None,
            vae=_vae_arch(vae) if vae else None,
            facts=facts,
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"the folder's configuration is not that of an SDXL model ({type(error).__name__}: {error})",
            where=where,
            fix="give a diffusers folder made for StableDiffusionXLPipeline",
        ) from None


def _unet_config(unet: UnetArch, facts: Facts, *, pooled_width: int) -> dict[str, Any]:
    attends = [depth > 0 for depth in unet.depths]
    return {
        "sample_size": facts.sample_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": list(unet.channels),
        "layers_per_block": NUM_RES_BLOCKS,
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        "transformer_layers_per_block": [max(depth, 1) for depth in unet.depths],
        # The number of heads: diffusers kept this misleading name in SDXL's configuration.
        "attention_head_dim": [width // facts.head_dim for width in unet.channels],
        "cross_attention_dim": unet.context_width,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (unet.size_vector_width - pooled_width) // NUM_SIZE_IDS,
        "projection_class_embeddings_input_dim": unet.size_vector_width,
        "use_linear_projection": True,
        "norm_num_groups": facts.norm_groups,
    }


def _vae_config(vae: VaeArch, facts: Facts) -> dict[str, Any]:
    return {
        "in_channels": vae.in_channels,
        "out_channels": vae.in_channels,
        "latent_channels": vae.latent_channels,
        "block_out_channels": list(vae.channels),
        "layers_per_block": NUM_RES_BLOCKS,
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.channels),
        "norm_num_groups": facts.vae_norm_groups,
        "sample_size": facts.sample_size * LATENT_FACTOR,
        "scaling_factor": SCALING_FACTOR,
    }


def _text_config(text: TextArch, facts: Facts, *, hidden_act: str, pad_id: int) -> dict[str, Any]:
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.width // facts.head_dim,
        "intermediate_size": text.feed_forward,
        "max_position_embeddings": text.num_positions,
        "projection_dim": text.projection or text.width,
        "hidden_act": hidden_act,
        "bos_token_id": BOS_ID,
        # The real end token. Released configurations say 2, which makes transformers pool at the largest id instead:
        # the wrong place as soon as textual inversion adds tokens.
        "eos_token_id": EOS_ID,
        "pad_token_id": pad_id,
    }


def _head_dim(configs: Mapping[Part, Mapping[str, Any]]) -> int:
    if unet := configs.get("unet"):
        heads = unet["attention_head_dim"]
        widths = unet["block_out_channels"]
        found = {width // count for width, count in zip(widths, heads, strict=True)}
    else:
        texts = (configs.get("text_encoder_1"), configs.get("text_encoder_2"))
        found = {text["hidden_size"] // text["num_attention_heads"] for text in texts if text} or {Facts.head_dim}
    if len(found) > 1:
        raise ValueError(f"several head widths: {sorted(found)}")
    return found.pop()


def _unet_arch(config: Mapping[str, Any]) -> UnetArch:
    if config.get("addition_embed_type") != "text_time":
        raise ValueError("the U-Net takes no size ids (addition_embed_type is not text_time)")
    depths = config["transformer_layers_per_block"]
    attends = ["CrossAttn" in name for name in config["down_block_types"]]
    return UnetArch(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        channels=tuple(config["block_out_channels"]),
        depths=tuple(depth if attention else 0 for depth, attention in zip(depths, attends, strict=True)),
        context_width=config["cross_attention_dim"],
        size_vector_width=config["projection_class_embeddings_input_dim"],
    )


def _text_arch(config: Mapping[str, Any], *, projection: int | None) -> TextArch:
    return TextArch(
        vocab_size=config["vocab_size"],
        num_positions=config["max_position_embeddings"],
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        feed_forward=config["intermediate_size"],
        projection=projection,
    )


def _vae_arch(config: Mapping[str, Any]) -> VaeArch:
    return VaeArch(
        in_channels=config["in_channels"],
        latent_channels=config["latent_channels"],
        channels=tuple(config["block_out_channels"]),
    )

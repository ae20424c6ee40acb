"""A new U-Net from a configuration, beside the text encoders and the VAE of an existing model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from library.errors import UserError
from library.models import identify
from library.models.arch import SdxlArch, check_facts
from library.models.assemble import build_module
from library.models.bundle import ModelBundle
from library.models.configs import arch_from_configs


def unet_arch(config_file: Path, beside: SdxlArch) -> SdxlArch:
    """`beside` with the U-Net that a UNet2DConditionModel's config.json describes.

    The text encoders decide the widths that the U-Net is conditioned on, the VAE the number of its channels. Raises
    UserError for a file that cannot be read, a U-Net that is not of SDXL's kind, and widths that do not go together.
    """
    where = f"--unet_config {config_file}"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the file cannot be read: {error}", where=where, fix="name a config.json") from error
    stated = arch_from_configs({"unet": config}, where=where)
    facts = replace(beside.facts, norm_groups=stated.facts.norm_groups, sample_size=stated.facts.sample_size)
    if stated.facts.head_dim != beside.facts.head_dim:
        raise UserError(
            f"the U-Net has {stated.facts.head_dim} channels per attention head, the text encoders "
            f"{beside.facts.head_dim}",
            where=where,
            fix=f"divide each width in block_out_channels by {beside.facts.head_dim} for attention_head_dim",
        )
    arch = replace(beside, unet=stated.unet, facts=facts)
    _check_widths(arch, where=where)
    identify.require_parts(arch, ("unet",), where=where)
    check_facts(arch, where=where)
    return arch


def new_unet(bundle: ModelBundle, config_file: Path, *, seed: int) -> None:
    """Put a U-Net with weights drawn from `seed` (float32, the library's own initialisation) into `bundle`."""
    arch = unet_arch(config_file, bundle.arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bundle.unet = build_module(arch, "unet").requires_grad_(False)
    bundle.arch = arch


def _check_widths(arch: SdxlArch, *, where: str) -> None:
    unet, first, second = arch.unet, arch.text_encoder_1, arch.text_encoder_2
    assert unet is not None and first is not None and second is not None
    text = first.width + second.width
    if unet.context_width != text:
        raise UserError(
            f"cross_attention_dim is {unet.context_width}, the text encoders give {text}",
            where=where,
            fix=f"set cross_attention_dim to {text}",
        )
    sizes = unet.size_vector_width - (second.projection or 0)
    if sizes <= 0 or sizes % 6:
        raise UserError(
            f"projection_class_embeddings_input_dim is {unet.size_vector_width}; less the pooled text's "
            f"{second.projection} it must be 6 times addition_time_embed_dim",
            where=where,
            fix=f"with addition_time_embed_dim 256, set it to {(second.projection or 0) + 6 * 256}",
        )

"""SDXL as a model family: the functions that caches, training and generation call."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.diffusion.conditioning import TextCond
from library.models import checkpoint, text_encode, token_ids, vae
from library.models.bundle import ModelBundle

load = checkpoint.load_bundle
tokenize = text_encode.tokenize
count_tokens = token_ids.count_tokens
encode_text = text_encode.encode_text
encode_text_gen = text_encode.encode_text_gen
encode_image = vae.encode_image
encode_moments = vae.encode_moments
decode_latents = vae.decode_latents
rows_not_finite = vae.rows_not_finite


def save(
    bundle: ModelBundle,
    path: str | Path,
    *,
    save_as: str = "safetensors",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a whole model: `save_as` "safetensors" (single file with header metadata) or "diffusers" (folder)."""
    assert save_as in ("safetensors", "diffusers"), save_as
    if save_as == "diffusers":
        checkpoint.save_diffusers(bundle, path, dtype=dtype)
    else:
        checkpoint.save_single_file(bundle, path, dtype=dtype, metadata=metadata)


def predict(unet: Any, x_BChw: Tensor, t_B: Tensor, text: TextCond, sizes_B6: Tensor, **extra: Any) -> Tensor:
    """The prediction (noise or velocity, as the model was trained), shape and dtype of the U-Net's output.

    x_BChw are noisy latents x 0.13025, t_B timesteps 0..999, sizes_B6 (original h, w, crop top, left, target h, w) in
    pixels, kept in float32 on the way to their sinusoids because half precision cannot hold them. extra: further
    arguments of the U-Net.
    """
    dtype = next(unet.parameters()).dtype  # diffusers' property looks at every module
    added = {"text_embeds": text.pooled_BP.to(dtype), "time_ids": sizes_B6.to(x_BChw.device, torch.float32)}
    x_BChw, t_B = x_BChw.to(dtype), t_B.to(x_BChw.device)
    return unet(x_BChw, t_B, encoder_hidden_states=text.hidden_BTD.to(dtype), added_cond_kwargs=added, **extra).sample

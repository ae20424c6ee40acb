"""Fills the caches: brings the VAE and the text encoders of a model together with the images and captions of a run.

Works in one process or many (`accelerate launch`, `torchrun`); every rank must call the passes, with equal data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from library.config.run_config import RunConfig
from library.data.cache_places import cache_place
from library.data.caching import CacheReport
from library.data.dataset import TrainData
from library.data.latent_caching import LatentCacheOptions, LatentEncoder, build_latents
from library.data.latent_filling import LatentFiller
from library.data.stores import LatentStore, TextStore
from library.data.text_backends import TextCacheOptions
from library.data.text_caching import TextEncoder, build_text
from library.diffusion.conditioning import TextCond
from library.models.bundle import ModelBundle
from library.models.families import sdxl


def cache_latents_pass(
    bundle: ModelBundle,
    data: TrainData,
    *,
    cfg: RunConfig,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    world: int = 1,
) -> tuple[LatentStore, CacheReport]:
    """Encode the images of `data` that are not cached yet; images that cannot be are dropped from `data`.

    The VAE runs in `dtype` (its own when None) and is moved to `device` only if there is something to encode, where
    it stays. To disk with --cache_latents_to_disk, else to memory. Returns the store to attach and what was done.
    """

    store, report = build_latents(
        data.all_images,
        latent_maker(bundle, cfg, device=device, dtype=dtype),
        options=latent_options(bundle, cfg),
        rank=rank,
        world=world,
    )
    data.drop(report.failed)
    return store, report


def fill_latents(
    bundle: ModelBundle,
    data: TrainData,
    *,
    cfg: RunConfig,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Have `data` encode the images that are not cached yet when they are first used (--cache_in_background).

    Those that are held out are encoded now. The VAE leaves the device when all are cached; images that are held out
    and cannot be encoded are dropped from `data`.
    """
    filler = LatentFiller(
        data.all_images,
        latent_maker(bundle, cfg, device=device),
        options=latent_options(bundle, cfg),
        done=lambda: bundle.vae.to("cpu"),
        rank=rank,
        world=world,
    )
    data.fill_latents(filler)


def latent_maker(
    bundle: ModelBundle, cfg: RunConfig, *, device: torch.device | str, dtype: torch.dtype | None = None
) -> Callable[[], LatentEncoder]:
    """What makes the encoder when it is needed: the VAE goes to the device then."""

    def make() -> LatentEncoder:
        _place(bundle.vae, device=device, dtype=dtype)
        return latent_encoder(bundle.vae, device=device, moments=cfg.data.cache_latents_moments)

    return make


def latent_options(bundle: ModelBundle, cfg: RunConfig) -> LatentCacheOptions:
    """How the settings want latents cached."""
    return LatentCacheOptions(
        vae_id=bundle.vae_id(),
        to_disk=cfg.data.cache_latents_to_disk,
        batch_size=cfg.model.vae_batch_size,
        skip_check=cfg.data.skip_cache_check,
        place=cache_place(cfg),
        moments=cfg.data.cache_latents_moments,
    )


def cache_text_pass(
    bundle: ModelBundle,
    data: TrainData,
    *,
    cfg: RunConfig,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    world: int = 1,
) -> tuple[TextStore, CacheReport]:
    """Encode the captions of `data` that are not cached yet, and the empty caption.

    The encoders run in `dtype` (their own when None) on `device`, where they stay. To disk with
    --cache_text_encoder_outputs_to_disk, else to memory. Returns the store to attach and what was done.
    """
    _place(bundle.text_encoder_1, device=device, dtype=dtype)
    _place(bundle.text_encoder_2, device=device, dtype=dtype)
    options = TextCacheOptions(
        text_encoder_id=bundle.text_encoder_id(),
        width_1=bundle.text_widths[0],
        max_token_length=cfg.model.max_token_length,
        weighted=cfg.model.weighted_captions,
        to_disk=cfg.data.cache_text_encoder_outputs_to_disk,
        batch_size=cfg.data.text_encoder_batch_size,
        skip_check=cfg.data.skip_cache_check,
        place=cache_place(cfg),
        num_variants=cfg.data.text_cache_variants,
    )
    return build_text(
        data.all_images, text_encoder(bundle, options, device=device), options=options, rank=rank, world=world
    )


def _place(module: nn.Module, *, device: torch.device | str, dtype: torch.dtype | None) -> None:
    # diffusers prints a remark whenever a dtype is named, even the same one.
    if dtype is None:
        module.to(device)
    else:
        module.to(device, dtype)


def latent_encoder(vae: nn.Module, *, device: torch.device | str, moments: bool = False) -> LatentEncoder:
    """The VAE as the cache wants it: CPU tensors in and out, and which rows came out finite.

    With `moments` the posterior's mean and log-variance (B, 8, h, w) take the place of the latents.
    """

    @torch.no_grad()  # not inference_mode: its tensors cannot enter a graph, and cached text does
    def encode(pixels_B3HW: Tensor, noise_B4hw: Tensor) -> tuple[Tensor, Tensor]:
        pixels_B3HW = pixels_B3HW.to(device)
        if moments:
            found = sdxl.encode_moments(vae, pixels_B3HW)
        else:
            found = sdxl.encode_image(vae, pixels_B3HW, noise_B4hw.to(device))
        found = found.float().cpu()
        return found, found.isfinite().flatten(1).all(dim=1)

    return encode


def text_encoder(bundle: ModelBundle, options: TextCacheOptions, *, device: torch.device | str) -> TextEncoder:
    """Both text encoders as the cache wants them: captions in, CPU tensors out."""

    @torch.no_grad()  # not inference_mode: its tensors cannot enter a graph, and cached text does
    def encode(captions: list[str]) -> TextCond:
        tokens = sdxl.tokenize(
            bundle.tokenizer, captions, max_token_length=options.max_token_length, weighted=options.weighted
        )
        return sdxl.encode_text(bundle.text_encoder_1, bundle.text_encoder_2, tokens.to(device)).to("cpu")

    return encode

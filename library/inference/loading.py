"""A model ready to draw: on its device, in its precision, with what makes it faster or smaller."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.errors import UserError
from library.log import get_logger
from library.models import attention, memory
from library.models.bundle import ModelBundle
from library.models.checkpoint import load_bundle

logger = get_logger(__name__)


@dataclass(frozen=True)
class Loading:
    """How a model is loaded for drawing.

    dtype: of all parts; vae_float32: but the VAE's. channels_last: how convolutions' weights lie in memory. tiling: let
    the VAE work on overlapping tiles of large pictures.
    """

    dtype: torch.dtype = torch.float32
    vae: str | None = None
    vae_float32: bool = False
    xformers: bool = False
    channels_last: bool = False
    tiling: bool = False


def best_device(local_rank: int = 0) -> str:
    """The CUDA device of this process, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return f"cuda:{local_rank}" if local_rank else "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_for_drawing(ckpt: str, how: Loading, *, device: str | torch.device | None = None) -> ModelBundle:
    """Load a model on `device` (None: the best there is), frozen, in eval mode; UserError for what cannot be used."""
    device = best_device() if device is None else device
    attention.check(xformers=how.xformers, device=device)
    dtypes = {"vae": torch.float32} if how.vae_float32 else None
    bundle = load_bundle(ckpt, vae=how.vae, dtype=how.dtype, dtypes=dtypes, device=device)
    memory.freeze(bundle)
    attention.configure(bundle.unet, xformers=how.xformers, device=device)
    if how.channels_last:
        for part in (bundle.unet, bundle.vae):
            part.to(memory_format=torch.channels_last)
    if how.tiling:
        memory.configure_vae(bundle.vae, tiling=True)
    return bundle


def compile_blocks(bundle: ModelBundle, *, backend: str = "inductor") -> None:
    """Compile the blocks of transformers in the U-Net, which are alike, so that few are compiled and all get faster.

    To be called when networks are in place. backend: one of torch.compile's.
    """
    try:
        bundle.unet.compile_repeated_blocks(backend=backend)
    except RuntimeError as error:
        raise UserError(f"the U-Net cannot be compiled: {error}", "compile", "remove compile") from error
    logger.info("the U-Net is compiled when it is first called, which takes a minute or more")

"""Which kernel computes attention: PyTorch's own (the default, nothing to do) or xformers."""

from importlib.util import find_spec
from typing import Any

import torch

from library.errors import UserError


def configure(unet: Any, *, xformers: bool, device: torch.device | str) -> None:
    """Use xformers in the U-Net when asked to; otherwise PyTorch's scaled_dot_product_attention stays in force.

    Raises UserError without a CUDA device or without the package. Text encoders and VAE keep PyTorch's attention.
    """
    check(xformers=xformers, device=device)
    if xformers:
        unet.enable_xformers_memory_efficient_attention()


def check(*, xformers: bool, device: torch.device | str) -> None:
    """Raise UserError when xformers is asked for and cannot work here; needs no model."""
    if not xformers:
        return
    if torch.device(device).type != "cuda":
        raise UserError(
            "xformers needs a CUDA device", where="--xformers", fix="use --sdpa, which is as fast or faster"
        )
    if find_spec("xformers") is None:
        raise UserError(
            "xformers is not installed",
            where="--xformers",
            fix="pip install xformers, or use --sdpa, which needs nothing",
        )

"""The VAE's posterior: a Gaussian per latent cell."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_posterior(moments_B8hw: Tensor, noise_B4hw: Tensor | None) -> Tensor:
    """mean + standard deviation * noise, or the mean without noise: latents (B, 4, h, w) in the dtype of the moments.

    Moments are mean then log-variance; the log-variance is held to the bounds of diffusers' Gaussian.
    """
    mean, log_variance = moments_B8hw.chunk(2, dim=1)
    if noise_B4hw is None:
        return mean
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise_B4hw.to(mean)

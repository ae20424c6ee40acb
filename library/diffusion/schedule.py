"""The noise schedule of SDXL: how much signal and how much noise a timestep mixes.

Shape letters: B batch, C latent channels, h w latent cells, N diffusion steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Variance-preserving schedule, defined by the cumulative product of alphas (N,), float64, falling in (0, 1).

    Tables stay in float64, where `1 - alphas_cumprod` keeps its digits; what is gathered is cast to the dtype of the
    sample, so half-precision samples stay half.
    """

    alphas_cumprod_N: Tensor

    def __post_init__(self) -> None:
        assert self.alphas_cumprod_N.ndim == 1 and self.alphas_cumprod_N.dtype == torch.float64

    @classmethod
    def scaled_linear(
        cls, num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Build the schedule Stable Diffusion was trained with: betas linear in their square roots."""
        betas_N = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2
        return cls(torch.cumprod(1.0 - betas_N, dim=0))

    @property
    def num_steps(self) -> int:
        """Number of diffusion steps N; timesteps run from 0 to N - 1."""
        return self.alphas_cumprod_N.shape[0]

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Move the table; gather on the device of the samples to avoid a host sync in every step."""
        return NoiseSchedule(self.alphas_cumprod_N.to(device))

    def signal(self, t_B: Tensor, like: Tensor) -> Tensor:
        """Return sqrt(alpha_cumprod[t]) in the dtype of `like`, shaped to broadcast over it: (B, 1, ...)."""
        return _broadcast(self.alphas_cumprod_N[t_B].sqrt(), like)

    def sigma(self, t_B: Tensor, like: Tensor) -> Tensor:
        """Return sqrt(1 - alpha_cumprod[t]) in the dtype of `like`, shaped to broadcast over it: (B, 1, ...)."""
        return _broadcast((1.0 - self.alphas_cumprod_N[t_B]).sqrt(), like)

    def add_noise(self, x0_BChw: Tensor, noise_BChw: Tensor, t_B: Tensor) -> Tensor:
        """Diffuse to timestep t: x_t = signal * x0 + sigma * noise (DDPM, Ho et al. 2020, eq. 4)."""
        return self.signal(t_B, x0_BChw) * x0_BChw + self.sigma(t_B, x0_BChw) * noise_BChw

    def velocity(self, x0_BChw: Tensor, noise_BChw: Tensor, t_B: Tensor) -> Tensor:
        """Return v = signal * noise - sigma * x0 (Salimans & Ho 2022, appendix D)."""
        return self.signal(t_B, x0_BChw) * noise_BChw - self.sigma(t_B, x0_BChw) * x0_BChw

    def snr(self, t_B: Tensor) -> Tensor:
        """Return alpha_cumprod / (1 - alpha_cumprod) at t, (B,), float64."""
        alphas_B = self.alphas_cumprod_N[t_B]
        return alphas_B / (1.0 - alphas_B)


def _broadcast(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))

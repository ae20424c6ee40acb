"""The noise schedule: how much signal and how much noise a timestep mixes.

Shape letters: B batch, C latent channels, h w latent cells, N diffusion steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Tables (N,) over the diffusion steps t = 0 .. N - 1: x_t = signal[t] * x0 + sigma[t] * noise.

    signal_N falls and sigma_N rises, both float64 in [0, 1]. timesteps_N is what the U-Net is told at step t: t itself
    (int64) for the schedules of Stable Diffusion, 1000 * sigma (float64) for rectified flow. SDXL's schedule, the one
    with zero terminal SNR and rectified flow differ in their tables only.

    Tables stay in float64, where small signals keep their digits; what is gathered is cast to the dtype of the sample,
    so half-precision samples stay half.
    """

    signal_N: Tensor
    sigma_N: Tensor
    timesteps_N: Tensor

    def __post_init__(self) -> None:
        assert self.signal_N.ndim == 1 and self.signal_N.dtype == self.sigma_N.dtype == torch.float64
        assert self.signal_N.shape == self.sigma_N.shape == self.timesteps_N.shape

    @classmethod
    def variance_preserving(cls, alphas_cumprod_N: Tensor) -> NoiseSchedule:
        """The schedule with signal sqrt(alpha_cumprod) and sigma sqrt(1 - alpha_cumprod); the table is float64."""
        steps_N = torch.arange(len(alphas_cumprod_N), device=alphas_cumprod_N.device)
        return cls(alphas_cumprod_N.sqrt(), (1.0 - alphas_cumprod_N).sqrt(), steps_N)

    @classmethod
    def scaled_linear(
        cls,
        num_steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        *,
        zero_terminal_snr: bool = False,
    ) -> NoiseSchedule:
        """Build the schedule Stable Diffusion was trained with: betas linear in their square roots.

        With `zero_terminal_snr` the signal is shifted to 0 at the last step and scaled to keep its first value
        (Lin et al. 2023, algorithm 1; spec conditioning.md section 6).
        """
        betas_N = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2
        alphas_cumprod_N = torch.cumprod(1.0 - betas_N, dim=0)
        if zero_terminal_snr:
            signal_N = alphas_cumprod_N.sqrt()
            first, last = signal_N[0], signal_N[-1]
            alphas_cumprod_N = ((signal_N - last) * (first / (first - last))) ** 2
        return cls.variance_preserving(alphas_cumprod_N)

    @classmethod
    def rectified_flow(cls, num_steps: int = 1000, shift: float = 1.0) -> NoiseSchedule:
        """A straight line from picture to noise: x_s = (1 - s) * x0 + s * noise with s = (t + 1) / num_steps.

        Step num_steps - 1 is pure noise; no step is free of noise. `shift` (> 0) moves the steps towards noise when
        above 1: s' = shift * s / (1 + (shift - 1) * s). The U-Net is told 1000 * s' whatever the shift, so a model
        trained with one shift can be used with another. Source: Liu et al. 2022; Esser et al. 2024, section 3.1 and
        eq. 23; diffusers' FlowMatchEulerDiscreteScheduler has the same numbers.
        """
        assert shift > 0, shift
        even_N = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
        sigma_N = shift * even_N / (1.0 + (shift - 1.0) * even_N)
        signal_N = (1.0 - even_N) / (1.0 + (shift - 1.0) * even_N)  # 1 - sigma, without cancellation
        return cls(signal_N, sigma_N, 1000.0 * sigma_N)

    @property
    def num_steps(self) -> int:
        """Number of diffusion steps N; t runs from 0 to N - 1."""
        return self.signal_N.shape[0]

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last step holds no signal at all: zero terminal SNR, and rectified flow."""
        return bool(self.signal_N[-1] == 0)

    @property
    def alphas_cumprod_N(self) -> Tensor:
        """The cumulative product of alphas (N,), float64, falling in [0, 1): signal^2 / (signal^2 + sigma^2).

        For rectified flow, which is not variance preserving, it is that of the schedule with the same SNR.
        """
        power_N = self.signal_N**2
        return power_N / (power_N + self.sigma_N**2)

    def tables(self) -> dict[str, Tensor]:
        """The tables by their names, e.g. to register them as buffers; `NoiseSchedule(**tables)` puts them back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Move the tables; gather on the device of the samples to avoid a host sync in every step."""
        return NoiseSchedule(**{name: table.to(device) for name, table in self.tables().items()})

    def timestep(self, t_B: Tensor) -> Tensor:
        """What the U-Net is told at step t, (B,): t_B itself (int64), or 1000 * sigma as float32 for rectified flow."""
        told_B = self.timesteps_N[t_B]
        return told_B.float() if told_B.is_floating_point() else told_B

    def signal(self, t_B: Tensor, like: Tensor) -> Tensor:
        """Return how much of x0 is in x_t, in the dtype of `like`, shaped to broadcast over it: (B, 1, ...)."""
        return _broadcast(self.signal_N[t_B], like)

    def sigma(self, t_B: Tensor, like: Tensor) -> Tensor:
        """Return how much noise is in x_t, in the dtype of `like`, shaped to broadcast over it: (B, 1, ...)."""
        return _broadcast(self.sigma_N[t_B], like)

    def add_noise(self, x0_BChw: Tensor, noise_BChw: Tensor, t_B: Tensor) -> Tensor:
        """Diffuse to step t: x_t = signal * x0 + sigma * noise (DDPM, Ho et al. 2020, eq. 4)."""
        return self.signal(t_B, x0_BChw) * x0_BChw + self.sigma(t_B, x0_BChw) * noise_BChw

    def velocity(self, x0_BChw: Tensor, noise_BChw: Tensor, t_B: Tensor) -> Tensor:
        """Return v = signal * noise - sigma * x0 (Salimans & Ho 2022, appendix D), for variance-preserving schedules.

        The velocity of rectified flow is another one and needs no schedule: noise - x0.
        """
        return self.signal(t_B, x0_BChw) * noise_BChw - self.sigma(t_B, x0_BChw) * x0_BChw

    def snr(self, t_B: Tensor) -> Tensor:
        """Return (signal / sigma)^2 at t, (B,), float64; 0 at the last step where the schedule ends in noise."""
        return (self.signal_N[t_B] / self.sigma_N[t_B]) ** 2


def _broadcast(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))

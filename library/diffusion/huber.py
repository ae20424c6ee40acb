"""What the pseudo-Huber losses share: their form, and where each sample's turns from quadratic to linear (a length c).

Shape letters: B batch, C latent channels, h w latent cells. Source: spec conditioning.md section 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from library.diffusion.schedule import NoiseSchedule

SCHEDULES = ("constant", "exponential", "snr")


@dataclass(frozen=True)
class HuberThreshold:
    """c from the timestep: `scale` times

    constant: base. exponential: base^(t / N), from 1 to base. snr: (1 - base) / (1 + sigma)² + base with sigma =
    1 / sqrt(snr) of the schedule in force, near 1 without noise and `base` in pure noise.
    """

    base: float = 0.1
    scale: float = 1.0
    schedule: str = "snr"

    def at(self, t_B: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
        """c of each sample, float64 (B,), above 0 for a base above 0."""
        assert self.schedule in SCHEDULES, self.schedule
        if self.schedule == "constant":
            c_B = torch.full(t_B.shape, self.base, dtype=torch.float64, device=t_B.device)
        elif self.schedule == "exponential":
            c_B = self.base ** (t_B.double() / noise_schedule.num_steps)
        else:
            root_B = noise_schedule.snr(t_B).sqrt()
            # 1 / (1 + sigma)² without the division by a ratio of 0
            c_B = (1 - self.base) * (root_B / (root_B + 1)) ** 2 + self.base
        return c_B * self.scale


def pseudo_huber(pred: Tensor, target: Tensor, threshold_B111: Tensor) -> Tensor:
    """sqrt(d² + c²) - c per element in float32, d = pred - target, c > 0; written so that a small d keeps its digits.

    Charbonnier et al. 1997; Song & Dhariwal 2023 (improved consistency training) for diffusion.
    """
    square = (pred.float() - target.float()) ** 2
    c = threshold_B111.float()
    return square / ((square + c**2).sqrt() + c)

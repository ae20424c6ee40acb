"""DREAM: train on the noise that sampling will really meet, which holds the model's own errors.

Zhou et al. 2023 (arXiv:2312.00210). Shape letters: B batch, C latent channels, h w latent cells.
"""

from __future__ import annotations

from torch import Tensor

from library.diffusion.schedule import NoiseSchedule

DREAM_PREDICTIONS = ("epsilon", "v_prediction")


def predicted_noise(
    prediction_BChw: Tensor, noisy_BChw: Tensor, t_B: Tensor, *, schedule: NoiseSchedule, prediction_type: str
) -> Tensor:
    """The noise that a prediction implies: itself, or for v sigma * x_t + signal * v."""
    assert prediction_type in DREAM_PREDICTIONS, prediction_type
    if prediction_type == "epsilon":
        return prediction_BChw
    return schedule.sigma(t_B, noisy_BChw) * noisy_BChw + schedule.signal(t_B, noisy_BChw) * prediction_BChw


def dream_change(
    noise_BChw: Tensor, predicted_BChw: Tensor, t_B: Tensor, *, schedule: NoiseSchedule, detail_preservation: float
) -> Tensor:
    """What is added to the noise, of the input and of the target alike: (noise - predicted) * sigma^p.

    `detail_preservation` is p (>= 0): the larger, the less early timesteps are changed. The model is not differentiated
    through it: pass a prediction made without gradients.
    """
    strength = schedule.sigma(t_B, noise_BChw) ** detail_preservation
    return (noise_BChw - predicted_BChw) * strength

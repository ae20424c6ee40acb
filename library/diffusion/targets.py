"""What the U-Net has to predict, and how a prediction leads back to the clean latent."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from library.diffusion.schedule import NoiseSchedule

PredictionType = Literal["epsilon", "v_prediction"]


def training_target(
    prediction_type: PredictionType, *, schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Return what the model should output at timestep t: the noise itself, or the velocity. x0, noise: (B, C, h, w)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return schedule.velocity(x0, noise, t)
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def to_x0(
    prediction_type: PredictionType, *, schedule: NoiseSchedule, xt: Tensor, prediction: Tensor, t: Tensor
) -> Tensor:
    """Return the clean latent that `prediction` implies for the noisy latent `xt`; both (B, C, h, w).

    epsilon: (x_t - sigma * eps) / signal; v: signal * x_t - sigma * v.
    """
    signal, sigma = schedule.signal(t, xt), schedule.sigma(t, xt)
    if prediction_type == "epsilon":
        return (xt - sigma * prediction) / signal
    if prediction_type == "v_prediction":
        return signal * xt - sigma * prediction
    raise ValueError(f"unknown prediction type {prediction_type!r}")

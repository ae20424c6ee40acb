"""What the U-Net has to predict, and how a prediction leads back to the clean latent."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from library.diffusion.schedule import NoiseSchedule

PredictionType = Literal["epsilon", "v_prediction", "rectified_flow"]


def training_target(
    prediction_type: PredictionType, *, schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Return what the model should output at step t: noise, velocity, or the flow noise - x0. All (B, C, h, w).

    Rectified flow goes with `NoiseSchedule.rectified_flow`, whose derivative by sigma its target is.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return schedule.velocity(x0, noise, t)
    if prediction_type == "rectified_flow":
        return noise - x0
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def to_x0(
    prediction_type: PredictionType, *, schedule: NoiseSchedule, xt: Tensor, prediction: Tensor, t: Tensor
) -> Tensor:
    """Return the clean latent that `prediction` implies for the noisy latent `xt`; both (B, C, h, w).

    epsilon: (x_t - sigma * eps) / signal, not finite where there is no signal; v: signal * x_t - sigma * v; rectified
    flow: x_t - sigma * v.
    """
    signal, sigma = schedule.signal(t, xt), schedule.sigma(t, xt)
    if prediction_type == "epsilon":
        return (xt - sigma * prediction) / signal
    if prediction_type == "v_prediction":
        return signal * xt - sigma * prediction
    if prediction_type == "rectified_flow":
        return xt - sigma * prediction
    raise ValueError(f"unknown prediction type {prediction_type!r}")

"""How much a timestep counts in the loss, by its signal-to-noise ratio.

All weights here say how much the error of the implied clean latent should count, and are divided by what the loss of
the predicted quantity already gives it: the squared error of the noise is snr times, that of the velocity (snr + 1)
times the squared error of the clean latent. They are made for these two; other predictions have no weights here.

Shape letters: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SNR_PREDICTIONS = ("epsilon", "v_prediction")
SNR_CAP = 1000.0
"""sd-scripts' upper bound of the ratio in the three weights that it calls scale, v-like and debiased."""
SNR_FLOOR = 1e-3
"""Lower bound where a weight of the noise loss would be infinite at a ratio of 0. The plain schedule ends at 0.0047, so
that this only acts near the end of a schedule whose terminal ratio is 0."""


@dataclass(frozen=True)
class Weighting:
    """Which weights act; 0 and False switch one off. They are multiplied in the order of the fields.

    min_snr_gamma: gamma of Min-SNR. soft_min_snr_gamma: gamma of its smooth form. p2_gamma, p2_k: P2.
    scale_v_like_noise: the velocity loss counts as a noise loss would. v_like_loss: how much of the velocity's loss is
    added to the noise's. debiased: debiased estimation.
    """

    min_snr_gamma: float = 0.0
    soft_min_snr_gamma: float = 0.0
    p2_gamma: float = 0.0
    p2_k: float = 1.0
    scale_v_like_noise: bool = False
    v_like_loss: float = 0.0
    debiased: bool = False

    @property
    def acting(self) -> tuple[str, ...]:
        """The flags of the weights that act."""
        flags = {
            "min_snr_gamma": self.min_snr_gamma,
            "soft_min_snr_gamma": self.soft_min_snr_gamma,
            "p2_gamma": self.p2_gamma,
            "scale_v_pred_loss_like_noise_pred": self.scale_v_like_noise,
            "v_pred_like_loss": self.v_like_loss,
            "debiased_estimation_loss": self.debiased,
        }
        return tuple(flag for flag, value in flags.items() if value)

    def factor(self, snr_B: Tensor, prediction_type: str) -> Tensor:
        """What each sample's loss is multiplied with, (B,), in the dtype of `snr_B` (>= 0); finite at snr 0 too."""
        assert not self.acting or prediction_type in SNR_PREDICTIONS, prediction_type
        factor_B = torch.ones_like(snr_B)
        if self.min_snr_gamma:
            factor_B = factor_B * min_snr(snr_B, self.min_snr_gamma, prediction_type)
        if self.soft_min_snr_gamma:
            factor_B = factor_B * soft_min_snr(snr_B, self.soft_min_snr_gamma, prediction_type)
        if self.p2_gamma:
            factor_B = factor_B * p2(snr_B, self.p2_gamma, self.p2_k, prediction_type)
        if self.scale_v_like_noise:
            factor_B = factor_B * v_to_noise(snr_B)
        if self.v_like_loss:
            factor_B = factor_B * (1 + self.v_like_loss / v_to_noise(snr_B.clamp(min=SNR_FLOOR)))
        if self.debiased:
            factor_B = factor_B * debiased(snr_B, prediction_type)
        return factor_B


def _is_v(prediction_type: str) -> bool:
    assert prediction_type in SNR_PREDICTIONS, prediction_type
    return prediction_type == "v_prediction"


def min_snr(snr_B: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """min(snr, gamma) / snr for noise, / (snr + 1) for v. At snr 0: 1 and 0.

    Hang et al. 2023 (arXiv:2303.09556), section 3.4.
    """
    if _is_v(prediction_type):
        return snr_B.clamp(max=gamma) / (snr_B + 1)
    return gamma / snr_B.clamp(min=gamma)


def soft_min_snr(snr_B: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR without its corner: snr * gamma / (snr + gamma) in place of min(snr, gamma). At snr 0: 1 and 0.

    Crowson et al. 2024 (Hourglass Diffusion Transformers, arXiv:2401.11605): 1 / (sigma² + 1/gamma);
    k-diffusion has it for gamma = 1.
    """
    if _is_v(prediction_type):
        return snr_B * gamma / (snr_B + gamma) / (snr_B + 1)
    return gamma / (snr_B + gamma)


def p2(snr_B: Tensor, gamma: float, k: float, prediction_type: str) -> Tensor:
    """1 / (k + snr)^gamma on the noise loss; on v the same weight of the clean latent, times snr / (snr + 1).

    Choi et al. 2022 (Perception Prioritized Training, arXiv:2204.00227). equation 8. At snr 0: 1/k^gamma and 0.
    """
    weight_B = (k + snr_B) ** -gamma
    return weight_B * snr_B / (snr_B + 1) if _is_v(prediction_type) else weight_B


def v_to_noise(snr_B: Tensor) -> Tensor:
    """s / (s + 1) with s = min(snr, 1000): what turns the loss of v into that of the noise. 0 at snr 0."""
    capped_B = snr_B.clamp(max=SNR_CAP)
    return capped_B / (capped_B + 1)


def debiased(snr_B: Tensor, prediction_type: str) -> Tensor:
    """1 / sqrt(s) for noise, 1 / (s + 1) for v, with s = min(snr, 1000).

    At snr 0 the weight of the noise is that of SNR_FLOOR, that of v is 1. Yu et al. 2023 (arXiv:2310.08442); the form
    for v is sd-scripts'.
    """
    capped_B = snr_B.clamp(max=SNR_CAP)
    if _is_v(prediction_type):
        return 1 / (capped_B + 1)
    return capped_B.clamp(min=SNR_FLOOR).rsqrt()

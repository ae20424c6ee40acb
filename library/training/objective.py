"""What a prediction is scored by: the loss, the mask, the weights of the timesteps. Made from the settings of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.diffusion.dream import DREAM_PREDICTIONS
from library.diffusion.huber import HuberThreshold
from library.diffusion.losses import l2
from library.diffusion.masks import apply_mask
from library.diffusion.reduce import per_sample
from library.diffusion.schedule import NoiseSchedule
from library.diffusion.weighting import SNR_PREDICTIONS, Weighting
from library.errors import UserError
from library.plugins import load_plugin

if TYPE_CHECKING:
    from library.config.cli import RunConfig


@dataclass(frozen=True)
class Objective:
    """How predictions are scored, and how the noise that they are about depends on model and latents.

    loss: a plugin's function of (prediction, target), both float32 BChw, or of these and `threshold_B111`.
    mask_by_area: divide each sample's masked loss by the mean of its mask. adaptive_noise_scale: see `training_noise`.
    dream: detail preservation of DREAM (>= 0), None without DREAM.
    """

    loss: Callable[..., Tensor] = l2.elementwise
    threshold: HuberThreshold = field(default_factory=HuberThreshold)
    weighting: Weighting = field(default_factory=Weighting)
    mask_by_area: bool = False
    adaptive_noise_scale: float = 0.0
    dream: float | None = None

    @classmethod
    def of(cls, cfg: RunConfig) -> Objective:
        """As the settings of a run say."""
        chosen = cfg.diffusion
        return cls(
            loss=load_plugin("library.diffusion.losses", chosen.loss_type).elementwise,
            threshold=HuberThreshold(chosen.huber_c, chosen.huber_scale, chosen.huber_schedule),
            weighting=Weighting(
                min_snr_gamma=chosen.min_snr_gamma or 0.0,
                soft_min_snr_gamma=chosen.soft_min_snr_gamma or 0.0,
                p2_gamma=chosen.p2_gamma or 0.0,
                p2_k=chosen.p2_k,
                scale_v_like_noise=chosen.scale_v_pred_loss_like_noise_pred,
                v_like_loss=chosen.v_pred_like_loss or 0.0,
                debiased=chosen.debiased_estimation_loss,
            ),
            mask_by_area=cfg.data.masked_loss_normalize == "area",
            adaptive_noise_scale=chosen.adaptive_noise_scale or 0.0,
            dream=chosen.dream_detail_preservation if chosen.dream_training else None,
        )

    def check(self, prediction_type: str) -> None:
        """Raise UserError for what has no meaning for a model of this kind; call it before weights are loaded."""
        wanted = self.weighting.acting
        if prediction_type not in SNR_PREDICTIONS and wanted:
            raise UserError(
                f"{' and '.join(wanted)}: weights by signal-to-noise ratio are made for epsilon and v, not for "
                f"{prediction_type}",
                fix="leave them out; timestep_sampling and timestep_bias_strategy choose the timesteps that count more",
            )
        if prediction_type not in DREAM_PREDICTIONS and self.dream is not None:
            raise UserError(
                f"dream_training is made for epsilon and v, not for {prediction_type}", fix="leave dream_training out"
            )
        if prediction_type != "v_prediction" and self.weighting.scale_v_like_noise:
            raise UserError(
                f"scale_v_pred_loss_like_noise_pred needs a model that predicts v; this one predicts {prediction_type}",
                fix="leave it out, or set v_parameterization for a v-prediction model",
            )
        if prediction_type == "v_prediction" and self.weighting.v_like_loss:
            raise UserError(
                "v_pred_like_loss is for a model that predicts noise; this one predicts v",
                fix="leave v_pred_like_loss out",
            )

    def row_losses(
        self,
        prediction_BChw: Tensor,
        target_BChw: Tensor,
        mask_B1hw: Tensor | None,
        *,
        t_B: Tensor,
        schedule: NoiseSchedule,
    ) -> Tensor:
        """The mean of the masked elementwise loss of each row, float32 (B,), without any weight."""
        arguments = [prediction_BChw.float(), target_BChw.float()]
        if takes_threshold(self.loss):
            arguments.append(self.threshold.at(t_B, schedule).float().view(-1, 1, 1, 1))
        loss_BChw = self.loss(*arguments)
        if mask_B1hw is not None:
            loss_BChw = apply_mask(loss_BChw, mask_B1hw, by_area=self.mask_by_area)
        return per_sample(loss_BChw)

    def factors(self, t_B: Tensor, *, schedule: NoiseSchedule, prediction_type: str) -> Tensor:
        """What each row's loss is multiplied with for its timestep, float32 (B,); ones without a weighting."""
        if not self.weighting.acting:
            return torch.ones(t_B.shape, device=t_B.device)
        return self.weighting.factor(schedule.snr(t_B), prediction_type).float()


def takes_threshold(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss depends on the Huber threshold, which it then names `threshold_B111`."""
    return "threshold_B111" in inspect.signature(loss).parameters

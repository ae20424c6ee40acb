"""Options about noise, timesteps and the loss."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from library.config.choices import LOSSES
from library.config.fields import Group, option


class DiffusionOptions(Group):
    """What the model is asked to predict and how the answer is scored."""

    title: ClassVar[str] = "diffusion"

    min_timestep: int = option(0, "lowest timestep that is drawn", ge=0, le=999)
    max_timestep: int = option(1000, "timesteps are drawn below this number", ge=1, le=1000)
    timestep_sampling: str = option(
        "uniform",
        "how often each timestep is drawn; logit_normal: most often in the middle, as for Stable Diffusion 3",
        choices=("uniform", "logit_normal"),
    )
    logit_mean: float = option(0.0, "logit_normal: above 0 later (noisier) timesteps are drawn more often")
    logit_std: float = option(1.0, "logit_normal: width of the distribution", gt=0)
    timestep_sequence: str = option(
        "random",
        "random: each sample draws for itself; stratified: of the n samples of a step one falls into each n-th of the "
        "distribution; sobol: a Sobol sequence over the samples of the epoch",
        choices=("random", "stratified", "sobol"),
    )
    timestep_bias_strategy: str = option(
        "none",
        "timesteps that are drawn more (or less) often: the first (earlier, with little noise) or last "
        "timestep_bias_portion of the 1000, or the range [timestep_bias_begin, timestep_bias_end)",
        choices=("none", "earlier", "later", "range"),
    )
    timestep_bias_multiplier: float = option(1.0, "how many times as often, above 0", gt=0)
    timestep_bias_begin: int = option(0, "first timestep of the range", ge=0, le=999)
    timestep_bias_end: int = option(1000, "the timestep after the range", ge=1, le=1000)
    timestep_bias_portion: float = option(0.25, "share of the timesteps that earlier and later favour", ge=0, le=1)

    noise_offset: float | None = option(
        None, "strength of noise that is constant over each latent channel (0: off; usual: 0.05)", ge=0
    )
    noise_offset_random_strength: bool = option(False, "draw each sample's noise_offset from 0 up to the value given")
    adaptive_noise_scale: float | None = option(
        None, "adds this times the absolute mean of each latent channel to noise_offset"
    )
    multires_noise_iterations: int | None = option(
        None, "levels of ever coarser noise that are added (0: off; usual: 6 to 10)", ge=0
    )
    multires_noise_discount: float = option(0.3, "strength of each such level relative to the one before", ge=0)
    ip_noise_gamma: float | None = option(
        None,
        "strength of noise that is added to the model's input and not to its target (0: off; usual: 0.1)",
        ge=0,
        aliases=["input_perturbation"],
    )
    ip_noise_gamma_random_strength: bool = option(
        False, "draw each sample's ip_noise_gamma from 0 up to the value given"
    )

    loss_type: str = option(
        "l2", f"how prediction and target are compared: {', '.join(LOSSES)}, or the dotted path of a module of your own"
    )
    huber_c: float = option(0.1, "huber and smooth_l1: error above which the loss grows linearly", gt=0)
    huber_scale: float = option(1.0, "huber and smooth_l1: multiplies that error in every huber_schedule", gt=0)
    huber_schedule: str = option(
        "snr",
        "huber and smooth_l1: how that error depends on the timestep: not, falling from 1 to huber_c exponentially, or "
        "by the signal-to-noise ratio",
        choices=("constant", "exponential", "snr"),
    )

    min_snr_gamma: float | None = option(
        None,
        "Min-SNR weighting: no timestep counts more than at this signal-to-noise ratio (0: off; usual: 5)",
        ge=0,
        aliases=["snr_gamma"],
    )
    soft_min_snr_gamma: float | None = option(None, "Min-SNR weighting without its corner (0: off; usual: 5)", ge=0)
    p2_gamma: float | None = option(
        None, "P2 weighting: the noise loss is divided by (p2_k + SNR) to this power (0: off; usual: 1)", ge=0
    )
    p2_k: float = option(1.0, "P2 weighting: see p2_gamma", gt=0)
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "v-prediction: let timesteps count as they do in the loss of the noise"
    )
    v_pred_like_loss: float | None = option(
        None, "noise prediction: add this much of what the loss of v would be (0: off)", ge=0
    )
    debiased_estimation_loss: bool = option(
        False, "divide the noise loss by the square root of the signal-to-noise ratio, the v loss by the ratio + 1"
    )
    dream_training: bool = option(
        False, "DREAM: train on the noise that the model itself would leave, at the cost of a second forward pass"
    )
    dream_detail_preservation: float = option(
        1.0, "DREAM: the larger, the less timesteps with little noise are changed", ge=0
    )

    @field_validator("loss_type")
    @classmethod
    def _known_loss(cls, value: str) -> str:
        if value not in LOSSES and "." not in value:
            raise ValueError(f"is not one of: {', '.join(LOSSES)}")
        return value

"""The samplers by name, on diffusers' schedulers and a few of our own, with noise that belongs to the picture.

Settings (gen_img.md §1): SDXL's betas, steps_offset 1 where timesteps are leading, no clipping of the predicted
picture, eta 0. A model with zero terminal SNR gets the betas of its own schedule and, since it was made to start from
pure noise, timesteps that begin at the last one (Lin et al. 2023, section 3.3). Rectified flow has sigmas of its
own. Every picture of a batch has its own CPU generator: its start noise is the first draw, then one draw
for every call of a sampler that adds noise. So the noise depends on the seed alone, not on batch or device.
"""

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from library.config.choices import FLOW_SAMPLERS, SAMPLERS, default_eta, split_sampler
from library.diffusion.schedule import NoiseSchedule
from library.diffusion.targets import PredictionType
from library.errors import UserError
from library.inference import schedulers
from library.models.prediction import flow_shift_of

_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_STEPS = 1000
_ALMOST_NOISE = 2.0**-24  # the last alpha of a schedule that ends in noise, as in diffusers: sigma 4096, not infinity


@dataclass(frozen=True)
class _Sampler:
    """scheduler: its class. settings: for its constructor. spaced: takes the spacing of its timesteps from outside."""

    scheduler: type
    settings: tuple[tuple[str, Any], ...] = ()
    min_steps: int = 1
    max_steps: int = _STEPS
    spaced: bool = True


_MULTISTEP, _UNIPC = diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler
_SAMPLERS = {
    "ddim": _Sampler(schedulers.DdimScheduler, (("clip_sample", False), ("steps_offset", 1))),
    "pndm": _Sampler(schedulers.PndmScheduler, (("steps_offset", 1),), min_steps=4),  # it starts with Runge-Kutta
    "lms": _Sampler(schedulers.LmsScheduler),
    "euler": _Sampler(diffusers.EulerDiscreteScheduler),
    "euler_a": _Sampler(schedulers.EulerAncestralScheduler),
    "heun": _Sampler(diffusers.HeunDiscreteScheduler),
    "dpm_2": _Sampler(schedulers.Dpm2Scheduler),
    "dpm_2_a": _Sampler(schedulers.Dpm2AncestralScheduler),
    # The first-generation solver is not defined at sigma 0, so it ends at the smallest trained sigma.
    "dpmsolver": _Sampler(_MULTISTEP, (("algorithm_type", "dpmsolver"), ("final_sigmas_type", "sigma_min"))),
    "dpmpp_2m": _Sampler(_MULTISTEP, (("algorithm_type", "dpmsolver++"),)),
    "dpmpp_2m_sde": _Sampler(_MULTISTEP, (("algorithm_type", "sde-dpmsolver++"),)),
    "dpmpp_sde": _Sampler(schedulers.DpmppSdeScheduler),
    "dpmsingle": _Sampler(diffusers.DPMSolverSinglestepScheduler, (("lower_order_final", True),), spaced=False),
    "unipc": _Sampler(_UNIPC),
    # Models of latent consistency are distilled at 50 timesteps, of which a run takes its own.
    "lcm": _Sampler(diffusers.LCMScheduler, (("original_inference_steps", 50),), max_steps=50, spaced=False),
}
_CUT = (_MULTISTEP, _UNIPC)  # diffusers cuts the timesteps of these to whole numbers


def make_scheduler(
    name: str,
    *,
    prediction_type: PredictionType,
    steps: int,
    schedule: NoiseSchedule | None = None,
    eta: float | None = None,
) -> Any:
    """A diffusers scheduler with its timesteps set, for steps 1 to 1000.

    schedule: the one the model was trained on (None: SDXL's). Rectified flow can be drawn by FLOW_SAMPLERS only, and
    takes the shift of its schedule. eta: the share of the noise, 0 to 1, of a sampler that has one (None: its own).
    Raises UserError for a name that is not a sampler or cannot draw such a model, for an eta that it does not have,
    and for numbers of steps that it cannot do.
    """
    if name not in SAMPLERS:
        raise UserError(f'"{name}" is not a sampler', "sampler", "choose one of " + ", ".join(SAMPLERS))
    basic, spread = split_sampler(name)
    chosen = _SAMPLERS[basic]
    if not chosen.min_steps <= steps <= chosen.max_steps:
        fix = f"take {chosen.min_steps} or more" if steps < chosen.min_steps else f"take {chosen.max_steps} or fewer"
        raise UserError(f"{name} cannot do {steps} steps", "steps", fix)
    if eta is not None and (default_eta(name) is None or prediction_type == "rectified_flow"):
        what = "eta cannot act on rectified flow" if default_eta(name) is not None else f"{name} has no eta"
        raise UserError(what, "eta", "remove it, or take ddim, euler_a or dpmpp_sde with another model")
    if prediction_type == "rectified_flow":
        return _flow_scheduler(name, steps=steps, shift=1.0 if schedule is None else flow_shift_of(schedule))
    settings: dict[str, Any] = dict(chosen.settings)
    if spread:
        settings[f"use_{spread}_sigmas"] = True
    if steps in (1, _STEPS) and chosen.spaced:
        # Even spacing puts a single step at the noise-free end, and a thousandth step on top of another.
        settings |= {"timestep_spacing": "trailing"}
    if schedule is not None and schedule.ends_in_noise:
        settings |= _zero_terminal_settings(name, prediction_type, steps=steps, schedule=schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers prefers dpmsolver++ to dpmsolver
        if chosen.scheduler is schedulers.PndmScheduler:
            scheduler = schedulers.PndmScheduler(**_BETAS, **settings, prediction_type="epsilon")
            scheduler.takes_velocity = prediction_type == "v_prediction"
        else:
            scheduler = chosen.scheduler(**_BETAS, **settings, prediction_type=prediction_type)
        scheduler.set_timesteps(steps)
    if spread and chosen.scheduler in _CUT:
        scheduler.timesteps = schedulers.timesteps_of(scheduler, scheduler.sigmas[:-1]).float()
    if eta is not None:
        scheduler.eta = eta
    return scheduler


def _zero_terminal_settings(
    name: str, prediction_type: PredictionType, *, steps: int, schedule: NoiseSchedule
) -> dict[str, Any]:
    """Betas of a schedule that ends in noise, and timesteps that begin there, or for epsilon models before it."""
    basic, spread = split_sampler(name)
    if basic == "pndm":
        raise UserError(
            "pndm cannot draw a model with zero terminal SNR: its Runge-Kutta start fails at pure noise",
            "sampler",
            "take another sampler, such as ddim or euler_a",
        )
    if spread:
        raise UserError(
            f"{name} cannot draw a model with zero terminal SNR: from pure noise on, {spread} sigmas would spend most "
            "steps where there is no picture yet",
            "sampler",
            f"take {basic}",
        )
    alphas_N = schedule.alphas_cumprod_N.clone()
    alphas_N[-1] = _ALMOST_NOISE
    betas_N = 1.0 - torch.cat([alphas_N[:1], alphas_N[1:] / alphas_N[:-1]])
    settings: dict[str, Any] = {"trained_betas": betas_N.tolist()}
    spaced = _SAMPLERS[basic].spaced
    if prediction_type != "epsilon":
        return settings | {"timestep_spacing": "trailing"} if spaced else settings
    if not spaced or steps in (1, _STEPS):
        raise UserError(
            f"{name} with {steps} steps starts at pure noise, where a noise prediction says nothing about the picture",
            "zero terminal SNR",
            "take 2 to 999 steps with another sampler, such as ddim",
        )
    return settings | {"timestep_spacing": "leading"}


def _flow_scheduler(name: str, *, steps: int, shift: float) -> Any:
    """A scheduler of rectified flow: sigmas evenly spaced from 1 to 1 / steps, then shifted; timesteps 1000 * sigma."""
    if name not in FLOW_SAMPLERS:
        raise UserError(
            f"{name} cannot draw a model of rectified flow", "sampler", "choose one of " + ", ".join(FLOW_SAMPLERS)
        )
    basic, _ = split_sampler(name)
    # DDIM of a rectified flow is Euler's method: both keep the predicted picture and noise and mix them anew.
    if basic in ("euler", "ddim"):
        euler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=_STEPS, shift=shift)
        euler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
        return euler
    chosen = _SAMPLERS[basic]
    solver = chosen.scheduler(
        **_BETAS,
        **dict(chosen.settings),
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )
    solver.set_timesteps(steps)
    solver.timesteps = solver.sigmas[:-1] * float(_STEPS)  # diffusers cuts them to whole numbers
    return solver


def start_noise(generators: list[torch.Generator], shape_Chw: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (B, C, h, w), float32 on the CPU, row i from generator i."""
    return torch.stack([torch.randn(shape_Chw, generator=generator) for generator in generators])


def step_arguments(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """The keyword arguments that make a scheduler draw each picture's noise from that picture's generator."""
    return {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}

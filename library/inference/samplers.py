"""The samplers by sd-scripts' names, on diffusers' schedulers, with noise that belongs to the picture.

Settings (gen_img.md §1): SDXL's betas, steps_offset 1 where timesteps are leading, no clipping of the predicted
picture, eta 0. A model with zero terminal SNR gets the betas of its own schedule and, since it was made to start from
pure noise, timesteps that begin at the last one (Lin et al. 2023, section 3.3). Rectified flow has schedulers of its
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
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from library.diffusion.schedule import NoiseSchedule
from library.diffusion.targets import PredictionType
from library.errors import UserError
from library.models.prediction import flow_shift_of

_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_STEPS = 1000
_ALMOST_NOISE = 2.0**-24  # the last alpha of a schedule that ends in noise, as in diffusers: sigma 4096, not infinity
_LMS_ORDER = 4


class LmsScheduler(diffusers.EulerDiscreteScheduler):
    """Linear multistep of order 4 in sigma (Adams-Bashforth, Katherine Crowson's K-LMS).

    Like diffusers' LMSDiscreteScheduler, with the Lagrange polynomials integrated exactly instead of by scipy's
    quadrature, so that scipy is not needed.
    """

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Start a new run: choose the sigmas and forget the slopes of the last one."""
        super().set_timesteps(*args, **kwargs)
        self.slopes: list[Tensor] = []

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **ignored: Any) -> Any:
        """One step from sigma_i to sigma_(i+1), from the model's output at sigma_i."""
        # Euler's step is sample + slope * (sigma_(i+1) - sigma_i): it yields the slope for either prediction type.
        index = self.step_index if self.step_index is not None else self.index_for_timestep(timestep)
        euler = super().step(model_output, timestep, sample)
        here = self.sigmas[index]
        self.slopes = [(sample - euler.pred_original_sample) / here, *self.slopes][:_LMS_ORDER]
        sigmas = self.sigmas[max(0, index - len(self.slopes) + 1) : index + 2].double().cpu().numpy()
        weights = _multistep_weights(sigmas[:-1][::-1], start=sigmas[-2], end=sigmas[-1])
        euler.prev_sample = sample + sum(w * slope for w, slope in zip(weights, self.slopes, strict=True))
        return euler


class PndmScheduler(diffusers.PNDMScheduler):
    """Pseudo linear multistep with a Runge-Kutta start (Liu et al. 2022), for either prediction type.

    diffusers' own turns a velocity into noise at the wrong point while it starts, so that is done here, before it.
    """

    takes_velocity = False

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **ignored: Any) -> Any:
        """One of the Runge-Kutta or multistep stages, from the model's output at `timestep`."""
        if self.takes_velocity:
            alpha = self.alphas_cumprod[int(timestep)]
            model_output = alpha.sqrt() * model_output + (1 - alpha).sqrt() * sample
        return super().step(model_output, timestep, sample)


class Dpm2AncestralScheduler(diffusers.KDPM2AncestralDiscreteScheduler):
    """DPM-Solver-2 with ancestral noise (Karras et al. 2022, algorithm 2, with eta 1), drawing as sd-scripts does.

    Its generators give noise in both stages of a step and the first is dropped; so a seed's noise is the same here.
    """

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None) -> Any:
        """One of the two stages of a step."""
        if self.state_in_first_order:
            randn_tensor(model_output.shape, generator=generator, dtype=model_output.dtype)
        return super().step(model_output, timestep, sample, generator=generator)


def _multistep_weights(nodes: np.ndarray, *, start: float, end: float) -> list[float]:
    """Integrals from start to end of the Lagrange polynomials on the nodes."""
    weights = []
    for node in nodes:
        others = nodes[nodes != node]
        integral = np.polynomial.Polynomial(np.atleast_1d(np.poly(others))[::-1]).integ()
        weights.append(float((integral(end) - integral(start)) / np.prod(node - others)))
    return weights


@dataclass(frozen=True)
class _Sampler:
    scheduler: type
    settings: tuple[tuple[str, Any], ...] = ()
    min_steps: int = 1


_DDIM = _Sampler(diffusers.DDIMScheduler, (("clip_sample", False), ("steps_offset", 1)))
_MULTISTEP = diffusers.DPMSolverMultistepScheduler
_SAMPLERS = {
    "ddim": _DDIM,
    "pndm": _Sampler(PndmScheduler, (("steps_offset", 1),), min_steps=4),  # it starts with Runge-Kutta
    "lms": _Sampler(LmsScheduler),
    "euler": _Sampler(diffusers.EulerDiscreteScheduler),
    "euler_a": _Sampler(diffusers.EulerAncestralDiscreteScheduler),
    "heun": _Sampler(diffusers.HeunDiscreteScheduler),
    "dpm_2": _Sampler(diffusers.KDPM2DiscreteScheduler),
    "dpm_2_a": _Sampler(Dpm2AncestralScheduler),
    # The first-generation solver is not defined at sigma 0, so it ends at the smallest trained sigma.
    "dpmsolver": _Sampler(_MULTISTEP, (("algorithm_type", "dpmsolver"), ("final_sigmas_type", "sigma_min"))),
    "dpmsolver++": _Sampler(_MULTISTEP, (("algorithm_type", "dpmsolver++"),)),
    "dpmsingle": _Sampler(diffusers.DPMSolverSinglestepScheduler, (("lower_order_final", True),)),
}
_FLOW_SOLVERS = {"dpmsolver++": _MULTISTEP, "dpmsingle": diffusers.DPMSolverSinglestepScheduler}
# DDIM of a rectified flow is Euler's method: both keep the predicted picture and noise and mix them anew.
_FLOW_EULER = ("euler", "k_euler", "ddim")
FLOW_NAMES = (*_FLOW_EULER, *_FLOW_SOLVERS)
_SAMPLERS |= {f"k_{name}": _SAMPLERS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}
NAMES = tuple(_SAMPLERS)


def make_scheduler(
    name: str, *, prediction_type: PredictionType, steps: int, schedule: NoiseSchedule | None = None
) -> Any:
    """A diffusers scheduler with its timesteps set, for steps 1 to 1000.

    schedule: the one the model was trained on (None: SDXL's). Rectified flow can be drawn by FLOW_NAMES only, and
    takes the shift of its schedule. Raises UserError for a name that is not a sampler or cannot draw such a model,
    and for fewer steps than the sampler can do.
    """
    if name not in _SAMPLERS:
        raise UserError(f'"{name}" is not a sampler', "sampler", "choose one of " + ", ".join(NAMES))
    chosen = _SAMPLERS[name]
    if steps < chosen.min_steps:
        raise UserError(f"{name} cannot do {steps} steps", "steps", f"take {chosen.min_steps} or more")
    if prediction_type == "rectified_flow":
        return _flow_scheduler(name, steps=steps, shift=1.0 if schedule is None else flow_shift_of(schedule))
    settings: dict[str, Any] = dict(chosen.settings)
    if steps in (1, _STEPS) and name != "dpmsingle":
        # Even spacing puts a single step at the noise-free end, and a thousandth step on top of another.
        settings |= {"timestep_spacing": "trailing"}
    if schedule is not None and schedule.ends_in_noise:
        settings |= _zero_terminal_settings(name, prediction_type, steps=steps, schedule=schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers prefers dpmsolver++ to dpmsolver
        if chosen.scheduler is PndmScheduler:
            scheduler = PndmScheduler(**_BETAS, **settings, prediction_type="epsilon")
            scheduler.takes_velocity = prediction_type == "v_prediction"
        else:
            scheduler = chosen.scheduler(**_BETAS, **settings, prediction_type=prediction_type)
        scheduler.set_timesteps(steps)
    return scheduler


def _zero_terminal_settings(
    name: str, prediction_type: PredictionType, *, steps: int, schedule: NoiseSchedule
) -> dict[str, Any]:
    """Betas of a schedule that ends in noise, and timesteps that begin there, or for epsilon models before it."""
    if name == "pndm":
        raise UserError(
            "pndm cannot draw a model with zero terminal SNR: its Runge-Kutta start fails at pure noise",
            "sampler",
            "take another sampler, such as ddim or euler_a",
        )
    alphas_N = schedule.alphas_cumprod_N.clone()
    alphas_N[-1] = _ALMOST_NOISE
    betas_N = 1.0 - torch.cat([alphas_N[:1], alphas_N[1:] / alphas_N[:-1]])
    settings: dict[str, Any] = {"trained_betas": betas_N.tolist()}
    if prediction_type != "epsilon":
        return settings if name == "dpmsingle" else settings | {"timestep_spacing": "trailing"}
    if name == "dpmsingle" or steps in (1, _STEPS):
        raise UserError(
            f"{name} with {steps} steps starts at pure noise, where a noise prediction says nothing about the picture",
            "zero terminal SNR",
            "take 2 to 999 steps with another sampler, such as ddim",
        )
    return settings | {"timestep_spacing": "leading"}


def _flow_scheduler(name: str, *, steps: int, shift: float) -> Any:
    """A scheduler of rectified flow: sigmas evenly spaced from 1 to 1 / steps, then shifted; timesteps 1000 * sigma."""
    if name not in FLOW_NAMES:
        raise UserError(
            f"{name} cannot draw a model of rectified flow", "sampler", "choose one of " + ", ".join(FLOW_NAMES)
        )
    if name in _FLOW_EULER:
        euler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=_STEPS, shift=shift)
        euler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
        return euler
    solver = _FLOW_SOLVERS[name](
        **_BETAS,
        **dict(_SAMPLERS[name].settings),
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

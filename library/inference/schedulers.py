"""The schedulers that diffusers does not have, or has with a defect, in the form of diffusers' own.

Each has `set_timesteps`, `timesteps`, `scale_model_input` and `step`; those that add noise take a list of generators,
one per row. sigma is the ratio of noise to signal; x = x0 + sigma * noise is what the K samplers step.
"""

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

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

    def begin_at(self, step: int) -> Tensor:
        """Begin at step number `step`, from 1 on without the Runge-Kutta start; returns the timesteps that are left.

        The multistep stages take their second timestep twice, the first time with Euler's method.
        """
        if step:
            left = torch.from_numpy(self._timesteps[::-1].copy())[step:]
            self.register_to_config(skip_prk_steps=True)
            self.timesteps = torch.cat([left[:1], left[1:2], left[1:]])
        return self.timesteps


class _NoiseOfStages:
    """Noise of the sigma between two steps, after the first stage of one, where diffusers takes that of the second."""

    _stage_index = 0

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x0 + sigma * noise at the sigma that the scheduler has come to."""
        if self.step_index is None or self.state_in_first_order:  # type: ignore[attr-defined]
            return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]
        return original_samples + noise * self.sigmas_interpol[self.step_index + self._stage_index]  # type: ignore[attr-defined]


class Dpm2Scheduler(_NoiseOfStages, diffusers.KDPM2DiscreteScheduler):
    """DPM-Solver-2 (Karras et al. 2022, algorithm 2, without noise), telling the model the timesteps of its sigmas."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Choose the sigmas of both stages and their timesteps."""
        super().set_timesteps(*args, **kwargs)
        _undo_rounding(self)


class Dpm2AncestralScheduler(_NoiseOfStages, diffusers.KDPM2AncestralDiscreteScheduler):
    """DPM-Solver-2 with ancestral noise (Karras et al. 2022, algorithm 2, with eta 1), drawing as sd-scripts does.

    Its generators give noise in both stages of a step and the first is dropped; so a seed's noise is the same here.
    """

    _stage_index = -1

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Choose the sigmas of both stages and their timesteps."""
        super().set_timesteps(*args, **kwargs)
        _undo_rounding(self)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None) -> Any:
        """One of the two stages of a step."""
        if self.state_in_first_order:
            randn_tensor(model_output.shape, generator=generator, dtype=model_output.dtype)
        return super().step(model_output, timestep, sample, generator=generator)


class DdimScheduler(diffusers.DDIMScheduler):
    """DDIM (Song et al. 2021, eq. 12); eta 0 adds no noise, 1 as much as DDPM."""

    eta = 0.0

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None) -> Any:
        """One step; with eta 0 nothing is drawn."""
        return super().step(model_output, timestep, sample, eta=self.eta, generator=generator)


class EulerAncestralScheduler(diffusers.EulerDiscreteScheduler):
    """Euler's method to a lower sigma than the next one, then noise up to it (Katherine Crowson's K-Euler ancestral).

    Like diffusers' EulerAncestralDiscreteScheduler, with Euler's choice of sigmas, and with eta (0 to 1), the share of
    the noise. It draws at every call, the last one too, as sd-scripts does.
    """

    eta = 1.0

    def towards(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> tuple[Any, float]:
        """The result of a step, whose prev_sample has no noise yet, and the deviation of its noise."""
        result = super().step(model_output, timestep, sample)
        here, there = self.sigmas[self.step_index - 1 : self.step_index + 1].tolist()
        down, up = ancestral_step(here, there, eta=self.eta)
        x0 = result.pred_original_sample
        result.prev_sample = x0 + (sample - x0) * (down / here)
        return result, up

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None) -> Any:
        """One step from sigma_i to sigma_(i+1)."""
        result, up = self.towards(model_output, timestep, sample)
        result.prev_sample = result.prev_sample + _noise_like(sample, generator) * up
        return result


class DpmppSdeScheduler(diffusers.EulerDiscreteScheduler):
    """DPM-Solver++ of the SDE, two stages a step (Lu et al. 2022; Katherine Crowson's K-DPM++ SDE with r = 1/2).

    The first stage goes half the way in log sigma, the second goes the whole way with the picture predicted there.
    The noise of both is one Brownian motion over sigma: the second stage adds what the first has drawn and an
    increment of its own. k-diffusion takes it from a tree that needs torchsde; the joint distribution is the same.
    eta (0 to 1) is the share of the noise. The last step, to sigma 0, has one stage and no noise.
    """

    eta, order = 1.0, 2

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Choose the sigmas, with a midpoint (geometric mean) in every step but the last."""
        super().set_timesteps(*args, **kwargs)
        sigmas = self.sigmas.double()
        middle = (sigmas[:-2] * sigmas[1:-1]).sqrt()
        self.timesteps = _interleaved(self.timesteps, timesteps_of(self, middle)).float()
        self.sigmas = torch.cat([_interleaved(sigmas[:-1], middle), sigmas[-1:]]).float()

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None) -> Any:
        """One of the two stages of a step."""
        result = super().step(model_output, timestep, sample)
        x0, index = result.pred_original_sample, self.step_index - 1
        if index + 1 == len(self.timesteps):
            result.prev_sample = x0
        elif index % 2 == 0:
            here, middle = self.sigmas[index : index + 2].tolist()
            self.start, self.first_noise = sample, _noise_like(sample, generator)
            result.prev_sample = _to_ancestral(sample, x0, self.first_noise, span=(here, middle), eta=self.eta)
        else:
            here, middle, there = self.sigmas[index - 1 : index + 2].tolist()
            noise = (here - middle) ** 0.5 * self.first_noise + (middle - there) ** 0.5 * _noise_like(sample, generator)
            noise = noise / (here - there) ** 0.5
            result.prev_sample = _to_ancestral(self.start, x0, noise, span=(here, there), eta=self.eta)
        return result


def ancestral_step(here: float, there: float, *, eta: float) -> tuple[float, float]:
    """(down, up): go from sigma `here` to `down` and add noise of deviation `up` to be at `there`.

    down^2 + up^2 = there^2; with eta 1 `up` is that of the reverse process (Song et al. 2021, eq. 16), with 0 none.
    """
    up = min(there, eta * there * max(0.0, here**2 - there**2) ** 0.5 / here)
    return (there**2 - up**2) ** 0.5, up


def timesteps_of(scheduler: Any, sigmas: Tensor) -> Tensor:
    """The timesteps (float64, not always whole) of sigmas on the scheduler's schedule: log sigma is linear between."""
    alphas_N = scheduler.alphas_cumprod.double().numpy()
    log_sigmas_N = np.log((1 - alphas_N) / alphas_N) / 2
    logs = sigmas.double().log().numpy()
    return torch.from_numpy(np.atleast_1d(np.interp(logs, log_sigmas_N, np.arange(len(log_sigmas_N)))))


def _undo_rounding(scheduler: Any) -> None:
    """Give the first stages of DPM-Solver-2 the timesteps of their sigmas, which diffusers rounds for Karras'."""
    if scheduler.config.use_karras_sigmas:
        sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])[: (len(scheduler.timesteps) + 1) // 2]
        scheduler.timesteps[::2] = timesteps_of(scheduler, sigmas).to(scheduler.timesteps)


def _to_ancestral(x: Tensor, x0: Tensor, noise: Tensor, *, span: tuple[float, float], eta: float) -> Tensor:
    """x from sigma span[0] to span[1], all the way towards the same picture x0, with the noise of an ancestral step."""
    down, up = ancestral_step(*span, eta=eta)
    return x0 + (x - x0) * (down / span[0]) + noise * up


def _noise_like(sample: Tensor, generator: Any) -> Tensor:
    return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)


def _interleaved(values: Tensor, between: Tensor) -> Tensor:
    """values with between[i] after values[i]; `between` is one shorter."""
    merged = torch.empty(len(values) + len(between), dtype=torch.float64)
    merged[::2], merged[1::2] = values.double(), between.double()
    return merged


def _multistep_weights(nodes: np.ndarray, *, start: float, end: float) -> list[float]:
    """Integrals from start to end of the Lagrange polynomials on the nodes."""
    weights = []
    for node in nodes:
        others = nodes[nodes != node]
        integral = np.polynomial.Polynomial(np.atleast_1d(np.poly(others))[::-1]).integ()
        weights.append(float((integral(end) - integral(start)) / np.prod(node - others)))
    return weights

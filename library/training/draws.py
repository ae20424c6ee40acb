"""Every random number of a training step, drawn per sample.

A sample's noise and timestep come from a generator keyed by (run seed, purpose, epoch, record, repeat), so they do not
depend on the batch size, the number of workers or ranks, or on where a run was resumed; no RNG state is ever saved.
Timesteps that are spread evenly over the samples of a step depend on the sample's place in the epoch as well, which is
the same on any number of workers and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.data.types import Place, SampleKey
from library.diffusion.noise import NoiseExtras, NoiseSettings, draw_extras, sample_noise
from library.diffusion.timesteps import (
    TimestepTable,
    biased,
    biased_steps,
    logit_normal_weights,
    sobol_number,
    stratified_number,
)
from library.errors import UserError
from library.seeds import derive_seed

if TYPE_CHECKING:
    from library.config.cli import RunConfig


@dataclass(frozen=True)
class Draw:
    """The random inputs of one micro-batch.

    noise_BChw: float32 standard normal, in the shape of the latents.
    t_B: int64 timesteps in [0, 999].
    posterior_BChw: float32 standard normal for the VAE posterior, or None when the latents come from a cache.
    extras: what is added to the noise.
    """

    noise_BChw: Tensor
    t_B: Tensor
    posterior_BChw: Tensor | None
    extras: NoiseExtras = field(default_factory=NoiseExtras)

    def to(self, device: torch.device) -> Draw:
        """The same draw on `device`."""
        posterior = None if self.posterior_BChw is None else self.posterior_BChw.to(device, non_blocking=True)
        noise, steps = self.noise_BChw.to(device, non_blocking=True), self.t_B.to(device, non_blocking=True)
        return Draw(noise, steps, posterior, self.extras.to(device))


@dataclass(frozen=True)
class Draws:
    """Makes the `Draw` of a micro-batch.

    timesteps: their distribution. sequence: where the number comes from that picks one: "random" (the sample's own),
    "stratified" or "sobol" (even over the samples of a step). noise: what is added to it.
    """

    run_seed: int
    timesteps: TimestepTable = field(default_factory=TimestepTable.uniform)
    sequence: str = "random"
    noise: NoiseSettings = field(default_factory=NoiseSettings)

    @classmethod
    def of(cls, cfg: RunConfig, run_seed: int) -> Draws:
        """As the settings of a run say. Raises UserError when they leave no timestep to draw."""
        chosen = cfg.diffusion
        noise = NoiseSettings(
            offset=chosen.noise_offset or 0.0,
            offset_is_random=chosen.noise_offset_random_strength,
            pyramid_iterations=chosen.multires_noise_iterations or 0,
            pyramid_discount=chosen.multires_noise_discount,
            perturbation=chosen.ip_noise_gamma or 0.0,
            perturbation_is_random=chosen.ip_noise_gamma_random_strength,
        )
        return cls(run_seed, timestep_table(cfg), chosen.timestep_sequence, noise)

    def _generator(self, purpose: str, key: SampleKey, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.run_seed, purpose, epoch, key.record, key.repeat))

    def _timestep(self, key: SampleKey, epoch: int, place: Place | None) -> int:
        if self.sequence == "sobol":
            assert place is not None, "an even sequence needs the places of the samples"
            scramble = derive_seed(self.run_seed, "timestep sequence", epoch)
            return self.timesteps.at(sobol_number(place.position, scramble=scramble))
        own = float(torch.rand((), generator=self._generator("timestep", key, epoch), dtype=torch.float64))
        if self.sequence == "random":
            return self.timesteps.at(own)
        assert self.sequence == "stratified" and place is not None, "an even sequence needs the places of the samples"
        # All samples of a step agree on where it begins.
        seed = derive_seed(self.run_seed, "timestep strata", epoch, place.position - place.in_step)
        return self.timesteps.at(stratified_number(place.in_step, place.step_size, jitter=own, seed=seed))

    def make(
        self,
        keys: Sequence[SampleKey],
        epoch: int,
        *,
        latent_shape: tuple[int, int, int],
        posterior: bool,
        places: Sequence[Place] = (),
    ) -> Draw:
        """Draw for the samples `keys` (B of them) in `epoch`; `latent_shape` is (C, h, w) in latent cells.

        `places` are those of the samples, which only an even sequence of timesteps needs.
        """
        noise, steps, posteriors, extras = [], [], [], []
        for row, key in enumerate(keys):

            def generator(purpose: str, key: SampleKey = key) -> torch.Generator:
                return self._generator(purpose, key, epoch)

            noise.append(sample_noise(generator("noise"), latent_shape))
            steps.append(self._timestep(key, epoch, places[row] if places else None))
            extras.append(draw_extras(self.noise, generator, latent_shape))
            if posterior:
                posteriors.append(sample_noise(generator("posterior"), latent_shape))
        return Draw(
            torch.stack(noise),
            torch.tensor(steps, dtype=torch.int64),
            torch.stack(posteriors) if posterior else None,
            NoiseExtras.cat(extras),
        )


def timestep_table(cfg: RunConfig) -> TimestepTable:
    """The distribution of timesteps: its shape, times the bias, cut to [min_timestep, max_timestep)."""
    chosen = cfg.diffusion
    weights_N = [1.0] * 1000
    if chosen.timestep_sampling == "logit_normal":
        weights_N = logit_normal_weights(chosen.logit_mean, chosen.logit_std)
    favoured = biased_steps(
        chosen.timestep_bias_strategy,
        portion=chosen.timestep_bias_portion,
        begin=chosen.timestep_bias_begin,
        end=chosen.timestep_bias_end,
    )
    weights_N = biased(weights_N, favoured, chosen.timestep_bias_multiplier)
    try:
        return TimestepTable.of(weights_N, chosen.min_timestep, chosen.max_timestep)
    except ValueError as error:
        raise UserError(
            f"no timestep can be drawn: {error}",
            where=f"--min_timestep {chosen.min_timestep} --max_timestep {chosen.max_timestep} --timestep_sampling "
            f"{chosen.timestep_sampling} --logit_mean {chosen.logit_mean} --logit_std {chosen.logit_std}",
            fix="choose a logit_mean and a larger logit_std whose timesteps lie in the range",
        ) from error

"""Every random number of a training step, drawn per sample.

A sample's noise and timestep come from a generator keyed by (run seed, purpose, epoch, record, repeat), so they do not
depend on the batch size, the number of workers or ranks, or on where a run was resumed; no RNG state is ever saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.data.types import SampleKey
from library.diffusion.noise import sample_noise
from library.diffusion.timesteps import sample_timestep
from library.seeds import derive_seed


@dataclass(frozen=True)
class Draw:
    """The random inputs of one micro-batch.

    noise_BChw: float32 standard normal, in the shape of the latents.
    t_B: int64 timesteps in [0, 999].
    posterior_BChw: float32 standard normal for the VAE posterior, or None when the latents come from a cache.
    """

    noise_BChw: Tensor
    t_B: Tensor
    posterior_BChw: Tensor | None

    def to(self, device: torch.device) -> Draw:
        """The same draw on `device`."""
        posterior = None if self.posterior_BChw is None else self.posterior_BChw.to(device, non_blocking=True)
        return Draw(self.noise_BChw.to(device, non_blocking=True), self.t_B.to(device, non_blocking=True), posterior)


@dataclass(frozen=True)
class Draws:
    """Makes the `Draw` of a micro-batch.

    min_timestep, max_timestep: the range of `sample_timestep`, in schedule steps.
    """

    run_seed: int
    min_timestep: int
    max_timestep: int

    def _generator(self, purpose: str, key: SampleKey, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.run_seed, purpose, epoch, key.record, key.repeat))

    def make(
        self, keys: Sequence[SampleKey], epoch: int, *, latent_shape: tuple[int, int, int], posterior: bool
    ) -> Draw:
        """Draw for the samples `keys` (B of them) in `epoch`; `latent_shape` is (C, h, w) in latent cells."""
        noise, steps, posteriors = [], [], []
        for key in keys:
            noise.append(sample_noise(self._generator("noise", key, epoch), latent_shape))
            steps.append(
                sample_timestep(
                    self._generator("timestep", key, epoch),
                    min_timestep=self.min_timestep,
                    max_timestep=self.max_timestep,
                )
            )
            if posterior:
                posteriors.append(sample_noise(self._generator("posterior", key, epoch), latent_shape))
        return Draw(
            torch.stack(noise), torch.tensor(steps, dtype=torch.int64), torch.stack(posteriors) if posterior else None
        )

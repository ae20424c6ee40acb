"""The loss on images that are not trained on, and on as many that are: the same noise and timesteps every time.

Each image is measured at the middles of equal bands of timesteps, with noise that depends on the image and the
timestep alone. What is measured is the run's loss per sample, with its prediction type, masks and noise schedule,
before any weight (of timesteps, of subsets): so the curves of runs that differ in such weights can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from library.data.comparison import training_subset
from library.data.dataset import TrainData
from library.data.types import Batch
from library.diffusion.noise import sample_noise
from library.seeds import derive_seed
from library.training.draws import Draw
from library.training.run import Parts, Run

if TYPE_CHECKING:
    from accelerate import Accelerator

HELD_OUT, TRAINED = "held_out", "train_subset"


class Band(NamedTuple):
    """Timesteps from `low` up to and including `high`, measured at `middle`."""

    low: int
    high: int
    middle: int


def timestep_grid(low: int, high: int, count: int) -> list[Band]:
    """`count` equal bands of [low, high), or one for each timestep when there are fewer."""
    count = min(count, high - low)
    edges = [low + (high - low) * k // count for k in range(count + 1)]
    return [Band(start, end - 1, (start + end - 1) // 2) for start, end in pairwise(edges)]


@dataclass(frozen=True)
class Means:
    """Mean losses of one set of images: over all timesteps, and per band. images: how many were measured."""

    mean: float
    bands: tuple[float, ...]
    images: int


@dataclass
class Validation:
    """Measures sets of images at a grid of timesteps.

    step: the `TrainStep` itself, not its wrapper for several processes: ranks measure different batches and only meet
    to add up their sums. seed: of noise and posterior draws. limit: batches of each set at most (None: all).
    """

    sets: dict[str, TrainData]
    training: TrainData
    step: nn.Module
    accelerator: Accelerator
    grid: Sequence[Band]
    seed: int
    limit: int | None = None
    latent_channels: int = 4

    @classmethod
    def of(cls, run: Run, parts: Parts) -> Validation:
        """As a run asks for, on its held-out images and an equally large part of those that it trains on."""
        held_out, chosen = run.data.validation, run.cfg.diffusion
        assert held_out is not None
        seed = held_out.settings.seed
        subset = training_subset(run.data, len(held_out.table.images), seed=seed)
        return cls(
            {HELD_OUT: held_out, TRAINED: subset},
            run.data,
            run.accelerator.unwrap_model(parts.step),
            run.accelerator,
            timestep_grid(chosen.min_timestep, chosen.max_timestep, run.cfg.validation.validation_timesteps),
            seed,
            run.cfg.validation.max_validation_steps,
        )

    def measure(self, scope: Callable[[], AbstractContextManager], tick: Callable[[], Any]) -> dict[str, Means]:
        """The losses of every set, by its name. Every rank must call it; `tick` is told of each batch done."""
        with scope():
            sums = {name: self._sums(data, tick) for name, data in self.sets.items()}
        return {name: _means(self._over_ranks(total_K)) for name, total_K in sums.items()}

    @property
    def num_batches(self) -> int:
        """Batches of one rank over all sets."""
        return sum(min(data.batches_per_epoch, self.limit or data.batches_per_epoch) for data in self.sets.values())

    def _batches(self, data: TrainData) -> Iterator[Batch]:
        if data is not self.training.validation:
            data.share_caches(self.training)
        for group in islice(data.epoch(0), self.limit):
            yield from group.micro_batches

    def _sums(self, data: TrainData, tick: Callable[[], Any]) -> Tensor:
        """Sums of the losses at each band, and the number of samples behind them, float64 (K + 1,)."""
        device = self.accelerator.device
        sums = torch.zeros(len(self.grid) + 1, dtype=torch.float64)
        for batch in self._batches(data):
            posterior = self._draw(batch, "validation posterior", timestep=0)
            with self.accelerator.autocast():
                encoded = self.step.encoded(batch.to(device), replace(posterior, posterior_BChw=posterior.noise_BChw))
            assert encoded.latents_B4hw is not None
            is_real_B = torch.arange(len(batch.keys), device=device) < batch.num_real
            counts_B = is_real_B & torch.isfinite(encoded.latents_B4hw).flatten(1).all(dim=1)
            losses = [torch.where(counts_B, self._losses(encoded, band), 0.0).double().sum() for band in self.grid]
            sums += torch.stack([*losses, counts_B.sum().double()]).cpu()
            tick()
        return sums

    def _losses(self, batch: Batch, band: Band) -> Tensor:
        """The loss of each row of an encoded batch in one band, float32 (B,)."""
        return self.step(batch, self._draw(batch, "validation", timestep=band.middle), plain=True).loss_B

    def _draw(self, batch: Batch, purpose: str, *, timestep: int) -> Draw:
        """The inputs of a pass over all rows at one timestep, on the run's device."""
        shape = (self.latent_channels, batch.bucket.h // 8, batch.bucket.w // 8)
        seeds = [derive_seed(self.seed, purpose, key.record, timestep) for key in batch.keys]
        noise = torch.stack([sample_noise(torch.Generator().manual_seed(seed), shape) for seed in seeds])
        steps_B = torch.full((len(seeds),), timestep, dtype=torch.int64)
        return Draw(noise, steps_B, None).to(self.accelerator.device)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return sums
        return self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").cpu()


def _means(sums: Tensor) -> Means:
    *totals, count = sums.tolist()
    bands = tuple(total / count if count else float("nan") for total in totals)
    return Means(sum(bands) / len(bands), bands, int(count))

"""What one optimizer step adds up while its micro-batches run; nothing of it is read from the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.data.types import Batch, SampleKey
from library.training.bands import NUM_BANDS, band_sums

if TYPE_CHECKING:
    from library.training.step import StepOutput


class StepTally:
    """Sums over the micro-batches of one step.

    skipped: the update's counter of skipped steps (0-d), as it is before the step.
    sums: float32 (2 + 2 * NUM_BANDS,), the loss, the samples that the VAE could not encode, then `band_sums`; the
    trainer adds those of all ranks. samples: keys and losses (float32 (num_real,)) of this rank's micro-batches.
    """

    def __init__(self, device: torch.device, skipped: Tensor) -> None:
        self.sums = torch.zeros(2 + 2 * NUM_BANDS, device=device)
        self.samples: list[tuple[Sequence[SampleKey], Tensor]] = []
        self._skipped_before = skipped.clone()

    def add(self, batch: Batch, t_B: Tensor, out: StepOutput, *, share: float) -> None:
        """One micro-batch, which holds `share` of the step's samples; `t_B` is on the device of `out`."""
        real = batch.num_real
        loss_B = out.loss_B[:real]
        self.samples.append((batch.keys[:real], loss_B))
        head = torch.stack([out.loss.detach() * share, out.not_finite])
        self.sums = self.sums + torch.cat([head, band_sums(loss_B, t_B[:real]).flatten()])

    def scalars(self, norm: Tensor, skipped: Tensor) -> dict[str, Tensor]:
        """What is logged of the step; `norm` is its gradient's, `skipped` the update's counter after it."""
        return {
            "loss": self.sums[0],
            "grad_norm": norm,
            "not_finite": self.sums[1],
            "skipped": skipped - self._skipped_before,
        }

    @property
    def bands(self) -> Tensor:
        """The part of `sums` that belongs to the timestep bands, float32 (2 * NUM_BANDS,)."""
        return self.sums[2:]

"""The loss by timestep band: where in the noise schedule a model is good, and where it learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NUM_BANDS = 10
STEPS_PER_BAND = 100  # of the 1000 of the schedule
NAMES = tuple(f"loss_band/{first:03d}-{first + STEPS_PER_BAND - 1:03d}" for first in range(0, 1000, STEPS_PER_BAND))


def band_sums(loss_B: Tensor, t_B: Tensor) -> Tensor:
    """Sum of the losses and count of the samples in each band, float32 (2, NUM_BANDS), on the device of `loss_B`.

    t_B: timesteps in [0, 1000). A loss that is not finite is left out. A product with a one-hot matrix instead of a
    scatter, whose order of additions is free on CUDA.
    """
    band_B = (t_B.long() // STEPS_PER_BAND).clamp(0, NUM_BANDS - 1)
    is_finite_B = torch.isfinite(loss_B)
    rows_2B = torch.stack([torch.where(is_finite_B, loss_B.float(), 0.0), is_finite_B.float()])
    one_hot_BN = torch.nn.functional.one_hot(band_B, NUM_BANDS).float()
    return rows_2B @ one_hot_BN


@dataclass
class BandTotals:
    """Adds up `band_sums` of many steps on the host, until an interval is over."""

    sums: list[float] = field(default_factory=lambda: [0.0] * NUM_BANDS)
    counts: list[float] = field(default_factory=lambda: [0.0] * NUM_BANDS)

    def add(self, numbers: list[float]) -> None:
        """One step's `band_sums`, flattened."""
        self.sums = [old + new for old, new in zip(self.sums, numbers[:NUM_BANDS], strict=True)]
        self.counts = [old + new for old, new in zip(self.counts, numbers[NUM_BANDS:], strict=True)]

    def take(self) -> dict[str, float]:
        """The mean loss of every band that had a sample, by its name in the log; starts the next interval."""
        rows = zip(NAMES, self.sums, self.counts, strict=True)
        means = {name: total / count for name, total, count in rows if count}
        self.__init__()  # type: ignore[misc]
        return means

    def state_dict(self) -> dict[str, Any]:
        """What has been added up of the running interval."""
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the interval that was saved."""
        self.sums, self.counts = list(state["sums"]), list(state["counts"])

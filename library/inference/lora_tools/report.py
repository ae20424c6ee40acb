"""Norms of changes and of the errors made on the way, summed over the modules of a part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TITLES = {
    "unet": "U-Net",
    "te1": "text encoder 1",
    "te2": "text encoder 2",
    "te": "text encoder",
    "text_encoder_1": "text encoder 1",
    "text_encoder_2": "text encoder 2",
}


def part_title(part: str) -> str:
    """What a part is called in tables."""
    return _TITLES.get(part, part)


@dataclass
class ErrorSums:
    """Squared Frobenius norms of wanted changes and of what is missing or too much in them, and the worst module."""

    part: str
    count: int = 0
    wanted: float = 0.0
    error: float = 0.0
    worst: float = 0.0

    def add(self, wanted: Tensor, error: Tensor) -> None:
        """Count one module: its wanted change and the error of what stands in the file, in any equal shapes."""
        wanted_square, error_square = _square(wanted), _square(error)
        self.count += 1
        self.wanted += wanted_square
        self.error += error_square
        self.worst = max(self.worst, _relative(error_square, wanted_square))

    @property
    def relative(self) -> float:
        """Norm of all errors over the norm of all wanted changes; 0 without changes."""
        return _relative(self.error, self.wanted)

    @staticmethod
    def table(sums: Sequence[ErrorSums], what: str) -> Iterator[str]:
        """Lines for the user; `what` names the error that is shown."""
        heads = f"{'modules':>8}  {'norm of change':>14}  {'relative error':>14}  {'worst module':>12}"
        yield f"{'part':<16}{heads}   ({what})"
        for one in sums:
            if one.count:
                yield (
                    f"{part_title(one.part):<16}{one.count:>8}  {math.sqrt(one.wanted):>14.6g}  {one.relative:>14.3e}  "
                    f"{one.worst:>12.3e}"
                )


def _square(matrix: Tensor) -> float:
    """Squared Frobenius norm; rows in float32, their sum in float64, which is fast and accurate to seven digits."""
    rows = torch.linalg.vector_norm(matrix.flatten(1), dim=1)
    return float(rows.double().square().sum())


def _relative(error: float, wanted: float) -> float:
    if wanted > 0:
        return math.sqrt(error / wanted)
    return math.inf if error > 0 else 0.0

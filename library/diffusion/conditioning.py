"""The text that the U-Net is conditioned on, as tokens and encoded.

Shape letters: B batch, n chunks per caption, L tokens per chunk (77), T text positions (75n + 2), D text width
(2048), P pooled width (1280).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TextCond:
    """Encoded captions: `hidden_BTD` for cross attention, `pooled_BP` for the added embedding."""

    hidden_BTD: Tensor
    pooled_BP: Tensor

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextCond:
        """Return the same rows on another device and/or in another floating dtype."""
        return TextCond(self.hidden_BTD.to(device=device, dtype=dtype), self.pooled_BP.to(device=device, dtype=dtype))

    @staticmethod
    def cat(parts: Sequence[TextCond]) -> TextCond:
        """Join along the batch; every part must have the same T."""
        return TextCond(
            torch.cat([part.hidden_BTD for part in parts]),
            torch.cat([part.pooled_BP for part in parts]),
        )

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> TextCond:
        """Select rows of the batch; an integer is refused because it would drop the batch dimension."""
        assert not isinstance(rows, int), "select with a slice or a list, e.g. cond[2:3]"
        return TextCond(self.hidden_BTD[rows], self.pooled_BP[rows])

    def __len__(self) -> int:
        return self.hidden_BTD.shape[0]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids of both tokenizers, (B, n, 77) int64, and per-position weights (B, 75n + 2) float32 or None."""

    ids_1_BnL: Tensor
    ids_2_BnL: Tensor
    weights_1: Tensor | None = None
    weights_2: Tensor | None = None

    def to(self, device: torch.device | str) -> Tokens:
        """Return the same tokens on another device."""
        return Tokens(
            self.ids_1_BnL.to(device),
            self.ids_2_BnL.to(device),
            None if self.weights_1 is None else self.weights_1.to(device),
            None if self.weights_2 is None else self.weights_2.to(device),
        )

    def __len__(self) -> int:
        return self.ids_1_BnL.shape[0]

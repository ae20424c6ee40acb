"""A model of a few sums in the place of VAE, text encoders and U-Net: what a training step does around them is real.

Options about data, noise, loss, optimizer, rates, saving and averages show in such a run as they do in a whole one: the
sums depend on everything that the parts of a model are given, and on every trained weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.diffusion.conditioning import TextCond, Tokens
from library.training import step


@contextmanager
def model_of_sums(patch: Any, parameters: list[Tensor]) -> Iterator[None]:
    """Steps of training see sums of what they hand over, and of `parameters`, which may be filled in later."""

    def predict(unet: Any, x_BChw: Tensor, t_B: Tensor, text: TextCond, sizes_B6: Tensor) -> Tensor:
        """Noisy latents times a factor near 1, plus one number for each row."""
        weights = torch.stack([(p.float() - 1).square().mean() for p in parameters]).mean()
        row_B = _spread(text.hidden_BTD) + _spread(text.pooled_BP) + _spread(sizes_B6) + t_B / 1000
        return x_BChw.float() * (1 + 0.1 * weights) + 0.1 * row_B.view(-1, 1, 1, 1)

    def encode_image(vae: Any, pixels_B3HW: Tensor, posterior_B4hw: Tensor) -> Tensor:
        """The means of cells of 8 x 8 pixels, the first channel twice, and the posterior's noise."""
        cells = F.avg_pool2d(pixels_B3HW, 8)
        return torch.cat([cells, cells[:, :1]], dim=1) + 0.1 * posterior_B4hw

    def encode_text(te1: Any, te2: Any, tokens: Tokens) -> TextCond:
        """The ids as numbers, times their weights where there are any."""
        hidden_BT = tokens.ids_1_BnL.flatten(1).float() / 50000
        if tokens.weights_1 is not None:
            hidden_BT = hidden_BT + _spread(tokens.weights_1)[:, None]
        return TextCond(hidden_BT[..., None], tokens.ids_2_BnL.flatten(1).float() / 50000)

    with patch.context() as inner:
        sums = SimpleNamespace(predict=predict, encode_image=encode_image, encode_text=encode_text)
        inner.setattr(step, "sdxl", sums)
        yield


def _spread(values: Tensor) -> Tensor:
    """One number for each row (B,), between -1 and 1, that depends on values and their places."""
    flat = values.float().flatten(1)
    return torch.sin(flat @ torch.linspace(0.5, 1.5, flat.shape[1]))

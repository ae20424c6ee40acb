"""Classifier-free guidance.

Shape letters: B batch, C latent channels, h w latent cells.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from library.diffusion.conditioning import TextCond
from library.inference.denoise import Predict

# (x_BChw, t_B, text, sizes_B6) -> noise or velocity
Model = Callable[[Tensor, Tensor, TextCond, Tensor], Tensor]


def guided(
    model: Model,
    *,
    positive: TextCond,
    positive_sizes_B6: Tensor,
    negative: TextCond | None,
    negative_sizes_B6: Tensor,
    scale: float,
) -> Predict:
    """A prediction pushed from the negative towards the positive: u + scale * (c - u).

    Both branches go through the model as one batch, negative first. With negative None the model is asked once,
    without guidance. Source: Ho and Salimans 2022, eq. 6.
    """
    if negative is None:

        def unguided(x_BChw: Tensor, t: Tensor) -> Tensor:
            return model(x_BChw, t.expand(len(x_BChw)), positive, positive_sizes_B6)

        return unguided
    text = TextCond.cat([negative, positive])
    sizes_B6 = torch.cat([negative_sizes_B6, positive_sizes_B6])

    def predict(x_BChw: Tensor, t: Tensor) -> Tensor:
        both = model(torch.cat([x_BChw, x_BChw]), t.expand(2 * len(x_BChw)), text, sizes_B6)
        u, c = both.float().chunk(2)
        return u + scale * (c - u)

    return predict

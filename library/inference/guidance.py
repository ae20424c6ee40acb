"""Classifier-free guidance, with a scale of its own for the negative prompt and rescaling.

Shape letters: B batch, C latent channels, h w latent cells.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.diffusion.conditioning import TextCond
from library.inference.denoise import Predict

# (x_BChw, t_B, text, sizes_B6) -> noise or velocity
Model = Callable[[Tensor, Tensor, TextCond, Tensor], Tensor]


@dataclass(frozen=True)
class Branch:
    """What the model is told in one branch of guidance: text conditions and size ids (B, 6), one row per picture."""

    text: TextCond
    sizes_B6: Tensor


@dataclass(frozen=True)
class Guidance:
    """How branches become one prediction.

    scale: strength of the prompt (1: none). negative_scale: strength of the negative prompt against no prompt at all,
    None for plain guidance, where the negative prompt takes the place of no prompt. rescale: 0 to 1, how far the
    deviation of the result is brought back to that of the prompt's own prediction.
    """

    scale: float
    negative_scale: float | None = None
    rescale: float = 0.0

    def combine(self, positive: Tensor, negative: Tensor, neutral: Tensor | None = None) -> Tensor:
        """The guided prediction (B, C, h, w) of float32 predictions of that shape.

        Plain: n + scale * (p - n) (Ho and Salimans 2022, eq. 6). With a neutral prediction u, that of the empty text:
        u + scale * (p - u) - negative_scale * (n - u), as sd-scripts means it; negative_scale = scale - 1 is plain
        guidance. Rescaling: Lin et al. 2023, eq. 15 and 16, each picture by itself, as in diffusers.
        """
        if neutral is None:
            guided = negative + self.scale * (positive - negative)
        else:
            assert self.negative_scale is not None
            guided = neutral + self.scale * (positive - neutral) - self.negative_scale * (negative - neutral)
        if not self.rescale:
            return guided
        wanted_B, found_B = positive.std(dim=(1, 2, 3), keepdim=True), guided.std(dim=(1, 2, 3), keepdim=True)
        return self.rescale * (guided * (wanted_B / found_B)) + (1 - self.rescale) * guided


def guided(
    model: Model,
    *,
    positive: Branch,
    negative: Branch | None = None,
    neutral: Branch | None = None,
    guidance: Guidance,
) -> Predict:
    """A prediction pushed from the negative towards the positive.

    All branches go through the model as one batch: negative, positive, neutral. With negative None the model is asked
    once, without guidance. neutral: the branch of the empty text, which a negative_scale needs.
    """
    if negative is None:

        def unguided(x_BChw: Tensor, t: Tensor) -> Tensor:
            return model(x_BChw, t.expand(len(x_BChw)), positive.text, positive.sizes_B6)

        return unguided
    branches = [negative, positive] if neutral is None else [negative, positive, neutral]
    text = TextCond.cat([branch.text for branch in branches])
    sizes = torch.cat([branch.sizes_B6 for branch in branches])

    def predict(x_BChw: Tensor, t: Tensor) -> Tensor:
        x = torch.cat([x_BChw] * len(branches))
        n, p, *u = model(x, t.expand(len(x)), text, sizes).float().chunk(len(branches))
        return guidance.combine(p, n, *u)

    return predict

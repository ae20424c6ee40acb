"""From latents to pictures."""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.models.bundle import ModelBundle
from library.models.families import sdxl


@torch.no_grad()
def decoded(bundle: ModelBundle, latents_BChw: Tensor, at_once: int) -> Iterator[Image.Image]:
    """Pictures of scaled latents (B, 4, h, w), `at_once` of them in memory.

    A CPU decodes them one by one, since some of the VAE's sums depend on the number of pictures there.
    """
    for part in latents_BChw.split(1 if bundle.vae.device.type == "cpu" else at_once):
        pixels = sdxl.decode_latents(bundle.vae, part / bundle.scaling_factor).float()
        values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        for picture in values.permute(0, 2, 3, 1).cpu().numpy():
            yield Image.fromarray(np.ascontiguousarray(picture))

"""Gradual Latent: Euler's ancestral method on latents that grow.

Source: gen_img.md section 12. Shape letters: B batch, C latent channels, h w latent cells.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from library.config.unsharp import Unsharp
from library.inference.deep_shrink import resized, shrunk
from library.inference.effects import Cells, GradualLatent
from library.inference.schedulers import EulerAncestralScheduler


class GradualScheduler:
    """A scheduler for the denoising loop whose steps change the size of the latents as `settings` say.

    It takes over an EulerAncestralScheduler whose timesteps are set. The noise of a small step is the corner of what
    would be drawn at the full size, so that a picture's later noise is the same whatever sizes come before.
    """

    order = 1

    def __init__(self, scheduler: EulerAncestralScheduler, settings: GradualLatent, *, full: Cells) -> None:
        self._scheduler, self._settings, self._full = scheduler, settings, full
        self._growth = settings.growth(full, scheduler.timesteps.tolist())
        self._step = 0
        self.timesteps, self.init_noise_sigma = scheduler.timesteps, scheduler.init_noise_sigma
        self.scale_model_input = scheduler.scale_model_input

    def begin(self, noise_BChw: Tensor) -> Tensor:
        """The noise that a picture starts from, out of noise of the full size."""
        return sharpened(shrunk(noise_BChw, self._settings.ratio), self._settings.unsharp)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None) -> Any:
        """One step from sigma_i to sigma_(i+1), and to the size that the latents have then."""
        result, up = self._scheduler.towards(model_output, timestep, sample)
        size, unsharp = self._growth[self._step], self._settings.unsharp
        self._step += 1
        if size is not None:
            if unsharp is None or unsharp.target_x:
                result.prev_sample = sharpened(resized(result.prev_sample, size), unsharp)
            else:
                change = resized(result.prev_sample - sample, size)
                result.prev_sample = sharpened(resized(sample, size), unsharp) + change
            up *= self._settings.s_noise
        h, w = result.prev_sample.shape[-2:]
        whole = (*sample.shape[:2], *self._full)
        noise = randn_tensor(whole, generator=generator, device=sample.device, dtype=sample.dtype)
        result.prev_sample = result.prev_sample + noise[..., :h, :w] * up
        return result


def sharpened(x_BChw: Tensor, unsharp: Unsharp | None) -> Tensor:
    """x + strength * (x - blurred x); the border is mirrored without its last cell. None: x itself."""
    if unsharp is None:
        return x_BChw
    return x_BChw + (x_BChw - _blurred(x_BChw, unsharp)) * unsharp.strength


def _blurred(x_BChw: Tensor, unsharp: Unsharp) -> Tensor:
    half, channels = unsharp.ksize // 2, x_BChw.shape[1]
    places_K = torch.arange(-half, half + 1, dtype=x_BChw.dtype, device=x_BChw.device)
    weights_K = torch.softmax(-0.5 * (places_K / unsharp.sigma) ** 2, dim=0)
    padded = F.pad(x_BChw, (half, half, half, half), mode="reflect")
    for shape in ((1, -1), (-1, 1)):
        kernel = weights_K.reshape(1, 1, *shape).expand(channels, -1, -1, -1)
        padded = F.conv2d(padded, kernel, groups=channels)
    return padded

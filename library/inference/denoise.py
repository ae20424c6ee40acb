"""The denoising loop, as a pure function of a prediction and a scheduler.

Shape letters: B batch, C latent channels, h w latent cells.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from library.inference.img2img import Init
from library.inference.samplers import step_arguments

# (x_BChw, t) -> noise, velocity or flow of the same shape; t is a 0-d tensor, not always a whole number.
Predict = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def denoise(
    predict: Predict,
    noise_BChw: Tensor,
    scheduler: Any,
    *,
    generators: list[torch.Generator],
    init: Init | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Latents (scaled, as the U-Net sees them) from standard normal noise; float32 whatever the model computes in.

    Schedulers of rectified flow start from the noise as it is and give the model what they have. The scheduler has its
    timesteps set. generators: one per row, for samplers that add noise while they run. init: the picture that is drawn
    over, which has its own noise. on_step is called after every call of the model.
    """
    arguments = step_arguments(scheduler, generators)
    scaled = getattr(scheduler, "scale_model_input", lambda latents, t: latents)
    latents, timesteps = noise_BChw.float() * getattr(scheduler, "init_noise_sigma", 1.0), scheduler.timesteps
    if init is not None:
        latents, timesteps = init.begin(scheduler)
    for number, t in enumerate(timesteps, start=1):
        x = scaled(latents, t)
        latents = scheduler.step(predict(x, t).float(), t, latents, **arguments).prev_sample
        if init is not None:
            latents = init.kept(scheduler, latents, timesteps[number] if number < len(timesteps) else None)
        if on_step is not None:
            on_step()
    return latents

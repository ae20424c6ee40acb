"""One pass through the denoising loop, of a batch of requests that can be drawn together."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from library.config.choices import split_sampler
from library.diffusion.conditioning import TextCond
from library.errors import UserError
from library.inference.batch_invariance import batch_invariant
from library.inference.denoise import denoise
from library.inference.effects import Cells
from library.inference.followers import Follower, UNetCall, all_on, models_of
from library.inference.gradual_latent import GradualScheduler
from library.inference.guidance import Branch, Guidance, guided
from library.inference.img2img import Init, init_noise, num_timesteps
from library.inference.request import CELL, MAX_SEED, STRENGTH, GenRequest
from library.inference.samplers import make_scheduler, start_noise
from library.inference.steady_attention import steady_attention
from library.inference.texts import Conditioning
from library.models.bundle import ModelBundle
from library.models.families import sdxl


@dataclass
class Stage:
    """What drawing needs beside the requests. bar: moves on by one for each step of each picture."""

    bundle: ModelBundle
    conditioning: Conditioning
    followers: Sequence[Follower]
    bar: tqdm

    def draw(
        self, batch: Sequence[GenRequest], init_BChw: Tensor | None = None, mask_B1hw: Tensor | None = None
    ) -> Tensor:
        """Latents (B, 4, h, w), scaled, float32, of requests that can be drawn together.

        init_BChw: scaled latents that are drawn over, at the requests' strength, where the mask
        is 1.
        """
        first, device = batch[0], self.bundle.unet.device
        scheduler = make_scheduler(
            first.sampler,
            prediction_type=self.bundle.prediction_type,
            steps=first.steps,
            schedule=self.bundle.schedule,
            eta=first.eta,
        )
        generators = [torch.Generator().manual_seed(_seed(request)) for request in batch]
        shape = (self.bundle.unet.config.in_channels, first.size.h // CELL, first.size.w // CELL)
        noise = start_noise(generators, shape).to(device)
        init, steps = None, first.steps
        if first.gradual_latent.is_on and init_BChw is None:  # what is drawn over has its composition already
            scheduler = GradualScheduler(scheduler, first.gradual_latent, full=Cells(*shape[1:]))
            noise = scheduler.begin(noise)
        calls = len(scheduler.timesteps)  # two-stage samplers ask the model twice a step
        if init_BChw is not None:
            check_steps(first)
            steps = first.steps_over
            mask = None if mask_B1hw is None else mask_B1hw.to(device)
            second = noise  # a mask starts all steps from noise alone
            if mask is None or steps < first.steps:
                draws = first.steps * draws_per_step(first.sampler)
                second = init_noise(generators, shape, draws_before=draws).to(device)
            init = Init(init_BChw.to(device, torch.float32), second, first.steps - steps, mask)
            calls = num_timesteps(scheduler, init.skipped)
        advance = len(batch) * steps / calls
        working, unet = all_on(self.followers, batch, calls=calls, device=device), self.bundle.unet
        invariant = batch_invariant(unet, len(batch), beside=models_of(self.followers))
        with torch.inference_mode(), working as before_call, invariant, steady_attention(unet):
            return denoise(
                self._predict(batch, device, calls, before_call),
                noise,
                scheduler,
                generators=generators,
                init=init,
                on_step=lambda: self.bar.update(advance),
            )

    def _predict(
        self, batch: Sequence[GenRequest], device: torch.device, calls: int, before_call: Callable[[UNetCall], None]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided prediction for a batch."""
        first, conditioning, done = batch[0], self.conditioning, 0
        dtype = next(self.bundle.unet.parameters()).dtype

        def model(x: Tensor, t_B: Tensor, text: TextCond, sizes_B6: Tensor) -> Tensor:
            nonlocal done
            call = UNetCall(done, calls, x, t_B, text, sizes_B6)
            done += 1
            before_call(call)
            return sdxl.predict(self.bundle.unet, x, t_B, text, sizes_B6, **call.extra)

        def branch(negative: bool, rows: Callable[[GenRequest], TextCond]) -> Branch:
            text = TextCond.cat([rows(request) for request in batch])
            sizes = [request.size_ids(negative=negative) for request in batch]
            return Branch(text.to(device, dtype), torch.tensor(sizes, dtype=torch.float32, device=device))

        with_negative, with_neutral = first.scale > 1, first.scale > 1 and first.negative_scale is not None
        return guided(
            model,
            positive=branch(False, conditioning.text),
            negative=branch(True, lambda request: conditioning.text(request, negative=True)) if with_negative else None,
            neutral=branch(True, conditioning.neutral) if with_neutral else None,
            guidance=Guidance(first.scale, first.negative_scale, first.guidance_rescale),
        )


def draws_per_step(sampler: str) -> int:
    """How many draws sd-scripts reserves for each step: two for dpm_2_a, one for every other sampler."""
    return 2 if split_sampler(sampler)[0] == "dpm_2_a" else 1


def check_steps(request: GenRequest) -> None:
    """Raise UserError when a request that is drawn over a picture has no step left at its strength."""
    if not request.steps_over:
        strength = STRENGTH if request.strength is None else request.strength
        what = f"strength {strength:g} of {request.steps} steps is less than one step"
        raise UserError(what, request.raw or "strength", "take more steps, or more strength")


def with_seeds(requests: Sequence[GenRequest]) -> list[GenRequest]:
    """The requests, with a random seed where they have none."""
    return [replace(request, seed=_seed(request)) for request in requests]


def _seed(request: GenRequest) -> int:
    return secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed

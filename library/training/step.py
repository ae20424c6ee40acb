"""One forward pass from a batch to a loss, as one module: wrapped whole, so that DDP sees every trained parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from library.data.types import Batch
from library.diffusion.conditioning import TextCond
from library.diffusion.masks import apply_mask
from library.diffusion.posterior import sample_posterior
from library.diffusion.reduce import per_sample, weighted_mean
from library.diffusion.schedule import NoiseSchedule
from library.diffusion.targets import training_target
from library.models.families import sdxl
from library.training.draws import Draw
from library.training.trainable import Trainable

if TYPE_CHECKING:
    from library.models.bundle import ModelBundle


class StepOutput(NamedTuple):
    """loss: float32 scalar to optimise, the mean over the batch's real rows. loss_B: float32 per row, detached.

    not_finite: 0-d float32, how many rows the VAE could not encode; they carry no weight.
    """

    loss: Tensor
    loss_B: Tensor
    not_finite: Tensor


class TrainStep(nn.Module):
    """Batch and draw in, loss out; pure in both.

    Order of operations: spec of the SDXL forward step (latents x 0.13025, text, noise, prediction, target, loss in
    float32, times the mask, mean over C, h, w, times the sample's weight, mean over the real rows).

    trained: the module that owns the trained parameters. elementwise_loss: a plugin's function of (prediction, target),
    both float32 BChw. with_text: whether batches come with tokens instead of cached text outputs. mask_by_area: divide
    each sample's masked loss by the mean of its mask.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        trainable: Trainable,
        trained: nn.Module,
        *,
        elementwise_loss: Callable[[Tensor, Tensor], Tensor],
        with_text: bool,
        mask_by_area: bool = False,
    ) -> None:
        super().__init__()
        self.unet = bundle.unet
        # Left out when their outputs are cached: what is registered here moves to the device.
        self.text_encoder_1 = bundle.text_encoder_1 if with_text else None
        self.text_encoder_2 = bundle.text_encoder_2 if with_text else None
        self.trained = trained
        self.bundle = bundle
        self.trainable = trainable
        self.elementwise_loss = elementwise_loss
        self.mask_by_area = mask_by_area
        # A buffer, so that it moves to the device with the module; float64, so that it keeps its precision.
        self.register_buffer("alphas_cumprod_N", bundle.schedule.alphas_cumprod_N, persistent=False)
        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        buffers = [name for name, _ in self.named_buffers()]
        # Frozen weights are equal on all ranks because they came from one file: broadcasting gigabytes of them when
        # DDP starts would only cost time.
        self._ddp_params_and_buffers_to_ignore = frozen + buffers

    def forward(self, batch: Batch, draw: Draw) -> StepOutput:
        """Loss of one micro-batch; `batch` and `draw` are on the module's device."""
        latents = self._latents(batch, draw) * self.bundle.scaling_factor
        finite_B = torch.isfinite(latents).flatten(1).all(dim=1)
        latents = torch.where(finite_B.view(-1, 1, 1, 1), latents, 0.0)
        weight_B = batch.weight_B * finite_B
        text = self._text(batch)
        schedule = NoiseSchedule(self.alphas_cumprod_N)
        noisy = schedule.add_noise(latents, draw.noise_BChw, draw.t_B)
        with self.trainable.forward_scope(batch):
            prediction = sdxl.predict(self.unet, noisy, draw.t_B, text, batch.sizes_B6)
        target = training_target(
            self.bundle.prediction_type, schedule=schedule, x0=latents, noise=draw.noise_BChw, t=draw.t_B
        )
        loss_BChw = self.elementwise_loss(prediction.float(), target.float())
        if batch.mask_B1hw is not None:
            loss_BChw = apply_mask(loss_BChw, batch.mask_B1hw, by_area=self.mask_by_area)
        loss_B = per_sample(loss_BChw)
        # A rank can hold nothing but padding: the last batch of a bucket has fewer samples than there are ranks.
        loss = weighted_mean(loss_B, weight_B, max(batch.num_real, 1))
        return StepOutput(loss, loss_B.detach(), (~finite_B).sum().float())

    def encoded(self, batch: Batch, draw: Draw) -> Batch:
        """The batch with encoded images and captions, for passes over it that need neither VAE nor text encoders."""
        encoded = {"latents_B4hw": self._latents(batch, draw), "text": self._text(batch)}
        return replace(batch, pixels_B3HW=None, moments_B8hw=None, tokens=None, **encoded)

    def _latents(self, batch: Batch, draw: Draw) -> Tensor:
        if batch.latents_B4hw is not None:
            return batch.latents_B4hw.float()
        if batch.moments_B8hw is not None:
            return sample_posterior(batch.moments_B8hw.float(), draw.posterior_BChw)
        # The VAE has a precision of its own (--no_half_vae), which autocast would overrule.
        with torch.no_grad(), torch.autocast(batch.pixels_B3HW.device.type, enabled=False):
            return sdxl.encode_image(self.bundle.vae, batch.pixels_B3HW, draw.posterior_BChw).float()

    def _text(self, batch: Batch) -> TextCond:
        if batch.text is not None:
            return batch.text.to(dtype=torch.float32)  # caches hold float16; widening changes no value
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.trainable.trains & {"te1", "te2"})):
            return sdxl.encode_text(self.text_encoder_1, self.text_encoder_2, batch.tokens)

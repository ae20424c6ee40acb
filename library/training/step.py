"""One forward pass from a batch to a loss, as one module: wrapped whole, so that DDP sees every trained parameter."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from library.data.types import Batch
from library.diffusion.conditioning import TextCond
from library.diffusion.dream import dream_change, predicted_noise
from library.diffusion.noise import training_noise
from library.diffusion.posterior import sample_posterior
from library.diffusion.reduce import weighted_mean
from library.diffusion.schedule import NoiseSchedule
from library.diffusion.targets import training_target
from library.models.families import sdxl
from library.training.draws import Draw
from library.training.objective import Objective
from library.training.trainable import Trainable

if TYPE_CHECKING:
    from library.models.bundle import ModelBundle


class StepOutput(NamedTuple):
    """loss: float32 scalar to optimise, the mean over the batch's real rows.

    loss_B: float32 per row, detached: the mean over C, h, w of the elementwise loss, masked, before any weight of the
    sample or of its timestep; the rows' timesteps are in the draw. not_finite: 0-d float32, how many rows the VAE could
    not encode; they carry no weight.
    """

    loss: Tensor
    loss_B: Tensor
    not_finite: Tensor


class TrainStep(nn.Module):
    """Batch and draw in, loss out; pure in both.

    Order of operations: spec of the SDXL forward step (latents x 0.13025, text, noise, prediction, target, loss in
    float32, times the mask, mean over C, h, w, times the sample's weight, times those of its timestep, mean over the
    real rows).

    trained: the module that owns the trained parameters. objective: how predictions are scored. with_text: whether
    batches come with tokens instead of cached text outputs.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        trainable: Trainable,
        trained: nn.Module,
        *,
        objective: Objective,
        with_text: bool,
    ) -> None:
        super().__init__()
        objective.check(bundle.prediction_type)
        self.unet = bundle.unet
        # Left out when their outputs are cached: what is registered here moves to the device.
        self.text_encoder_1 = bundle.text_encoder_1 if with_text else None
        self.text_encoder_2 = bundle.text_encoder_2 if with_text else None
        self.trained = trained
        self.bundle = bundle
        self.trainable = trainable
        self.objective = objective
        # Buffers, so that they move to the device with the module; float64, so that they keep their precision.
        for name, table in bundle.schedule.tables().items():
            self.register_buffer(name, table, persistent=False)
        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        buffers = [name for name, _ in self.named_buffers()]
        # Frozen weights are equal on all ranks because they came from one file: broadcasting gigabytes of them when
        # DDP starts would only cost time.
        self._ddp_params_and_buffers_to_ignore = frozen + buffers

    def forward(self, batch: Batch, draw: Draw, *, plain: bool = False) -> StepOutput:
        """Loss of one micro-batch; `batch` and `draw` are on the module's device. `plain`: without DREAM's target."""
        latents = self._latents(batch, draw) * self.bundle.scaling_factor
        finite_B = torch.isfinite(latents).flatten(1).all(dim=1)
        latents = torch.where(finite_B.view(-1, 1, 1, 1), latents, 0.0)
        weight_B = batch.weight_B * finite_B
        text = self._text(batch)
        schedule = NoiseSchedule(self.signal_N, self.sigma_N, self.timesteps_N)
        t_B, prediction_type = draw.t_B, self.bundle.prediction_type
        noise, input_noise = training_noise(
            draw.noise_BChw, draw.extras, latents, adaptive_scale=self.objective.adaptive_noise_scale
        )

        def predict(input_noise: Tensor) -> tuple[Tensor, Tensor]:
            """The noisy latents and what the U-Net makes of them."""
            noisy = schedule.add_noise(latents, input_noise, t_B)
            return noisy, sdxl.predict(self.unet, noisy, schedule.timestep(t_B), text, batch.sizes_B6)

        with self.trainable.forward_scope(batch):
            if self.objective.dream is not None and not plain:
                with torch.no_grad():
                    noisy, first = predict(input_noise)
                foreseen = predicted_noise(
                    first.float(), noisy, t_B, schedule=schedule, prediction_type=prediction_type
                )
                change = dream_change(noise, foreseen, t_B, schedule=schedule, detail_preservation=self.objective.dream)
                noise, input_noise = noise + change, input_noise + change
            _, prediction = predict(input_noise)
        target = training_target(prediction_type, schedule=schedule, x0=latents, noise=noise, t=t_B)
        loss_B = self.objective.row_losses(prediction, target, batch.mask_B1hw, t_B=t_B, schedule=schedule)
        factor_B = self.objective.factors(t_B, schedule=schedule, prediction_type=prediction_type)
        # A rank can hold nothing but padding: the last batch of a bucket has fewer samples than there are ranks.
        loss = weighted_mean(loss_B * factor_B, weight_B, max(batch.num_real, 1))
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

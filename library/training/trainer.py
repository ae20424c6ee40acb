"""The loop. Everything that varies is handed in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.data.types import Batch, StepGroup
from library.seeds import derive_seed
from library.training.draws import Draws
from library.training.hooks import Event, Hook, View
from library.training.metering import StepTally
from library.training.optim import effective_rates
from library.training.state import Progress
from library.training.trainable import Trainable
from library.training.update import Update

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.data.dataset import TrainData


@dataclass
class Trainer:
    """Runs optimizer steps until `view.total_steps`, an epoch limit or a stop request.

    step: the wrapped `TrainStep`. update: clip and optimizer step. scheduler: stepped once per optimizer step.
    announce: told the estimated seconds per step before the first one (None: too short a run to measure).
    latent_channels: C of the latents. Sizes of noise follow each batch's bucket (H/8, W/8).
    """

    accelerator: Accelerator
    step: torch.nn.Module
    trainable: Trainable
    data: TrainData
    draws: Draws
    update: Update
    scheduler: Any
    view: View
    hooks: Sequence[Hook]
    announce: Callable[[float | None], None]
    latent_channels: int = 4

    def run(self) -> None:
        """Train; hooks fire on START, every STEP, every EPOCH and END."""
        progress, view = self.view.progress, self.view
        started = False
        while progress.global_step < view.total_steps and not view.stop:
            for group in view.clock.timed(self._groups(progress)):
                if not started:
                    self.announce(self._seconds_per_step(group))
                    self._fire(Event.START)
                    started = True
                self._one_step(group)
                if progress.global_step >= view.total_steps or view.stop:
                    break
            if progress.step_in_epoch >= self.data.steps_in(progress.epoch):
                progress.next_epoch()
                self._fire(Event.EPOCH)
        if not started:  # a finished run was resumed
            self._fire(Event.START)
        self._fire(Event.END)

    def _seconds_per_step(self, group: StepGroup) -> float | None:
        """Time of a step, from forward and backward passes whose gradients are thrown away; None for a short run.

        It needs no optimizer step and every random number is drawn anew, so the run does not notice. The first pass
        warms up and is only counted when it is so long that a second one would cost the user more than it tells.
        """
        if self.view.total_steps - self.view.progress.global_step < 20:
            return None
        for _ in range(2):
            begin = time.perf_counter()
            self._seed_dropout(0)
            batch = group.micro_batches[0]
            out = self.step(batch.to(self.accelerator.device), self._draw(batch).to(self.accelerator.device))
            with self.update.discarding():
                self.accelerator.backward(out.loss)
            out.loss.item()
            elapsed = torch.tensor(time.perf_counter() - begin, device=self.accelerator.device)
            # Agreed on, because all ranks must make the same number of passes.
            seconds = self._over_ranks(elapsed).item() / self.accelerator.num_processes
            self.update.optimizer.zero_grad(set_to_none=True)
            if seconds > 10:
                break
        return seconds * len(group.micro_batches)

    def _groups(self, progress: Progress) -> Iterator[StepGroup]:
        return self.data.epoch(progress.epoch, progress.step_in_epoch)

    def _one_step(self, group: StepGroup) -> None:
        """The micro-batches of one optimizer step, the update, the meters, the hooks."""
        progress = self.view.progress
        world = self.accelerator.num_processes
        tally = StepTally(self.accelerator.device, self.update.skipped)
        for index, batch in enumerate(group.micro_batches):
            self._seed_dropout(index)
            with self._no_sync_unless_last(index, group):
                draw = self._draw(batch).to(self.accelerator.device)
                out = self.step(batch.to(self.accelerator.device), draw)
                # DDP averages over ranks: times world makes the gradient that of the mean over the group's samples.
                share = batch.num_real / group.samples
                # 0 * loss is NaN when the loss is not finite, and then so is every gradient of every rank: the update
                # leaves such a step out, and nothing has to be read from the device for it.
                self.accelerator.backward(out.loss * (share * world + 0.0 * out.loss.detach()))
            tally.add(batch, draw.t_B, out, share=share)
        norm = self.update()
        rates, groups = self.scheduler.get_last_lr(), self.update.optimizer.param_groups
        lr = {f"lr/{group['name']}": rate for group, rate in zip(groups, rates, strict=True)} | effective_rates(groups)
        self.scheduler.step()
        tally.sums = self._over_ranks(tally.sums)
        scalars = tally.scalars(norm, self.update.skipped) | dict(self.trainable.after_step())
        progress.advance(group.samples)
        facts = {"step": progress.global_step, "epoch": progress.epoch + 1}
        self.view.meters.update({**facts, **lr}, scalars, tally)
        self._fire(Event.STEP)

    def _draw(self, batch: Batch):
        cached = batch.latents_B4hw is not None
        shape = (self.latent_channels, batch.bucket.h // 8, batch.bucket.w // 8)
        return self.draws.make(
            batch.keys, self.view.progress.epoch, latent_shape=shape, posterior=not cached, places=batch.places
        )

    def _seed_dropout(self, micro: int) -> None:
        """Module dropout has no per-sample generator, so it is reseeded for every micro-batch of every rank."""
        step, rank = self.view.progress.global_step, self.accelerator.process_index
        torch.manual_seed(derive_seed(self.draws.run_seed, "dropout", step, micro, rank))

    def _no_sync_unless_last(self, index: int, group: StepGroup) -> contextlib.AbstractContextManager:
        if index == len(group.micro_batches) - 1:
            return self.update.last_backward()
        return self.accelerator.no_sync(self.step)

    def _over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value, reduction="sum")

    def _fire(self, event: Event) -> None:
        """Tell every hook; at the end in reverse, so that what was set up first is taken down last."""
        for hook in reversed(self.hooks) if event is Event.END else self.hooks:
            hook(event, self.view)

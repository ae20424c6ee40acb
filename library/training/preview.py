"""Sample pictures during training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.errors import UserError
from library.inference import launch as inference
from library.inference.prompt_line import GenRequest
from library.inference.texts import TextForm
from library.log import get_logger
from library.training.hooks import Event, View
from library.training.requests import SAMPLE

if TYPE_CHECKING:
    from library.models.bundle import ModelBundle

log = get_logger(__name__)


def is_due(event: Event, view: View, settings: Any) -> bool:
    """Whether `event` makes sample pictures; a period in epochs switches the period in steps off, as in sd-scripts."""
    progress = view.progress
    if event is Event.STEP and SAMPLE in view.requested:
        return True
    if event is Event.START:
        return settings.sample_at_first and progress.global_step == 0
    if event is Event.EPOCH and settings.sample_every_n_epochs:
        return progress.epoch % settings.sample_every_n_epochs == 0
    if event is Event.STEP and settings.sample_every_n_steps and not settings.sample_every_n_epochs:
        return progress.global_step % settings.sample_every_n_steps == 0
    return False


def file_name(event: Event, view: View, *, name: str | None, index: int, seed: int | None, stamp: str) -> str:
    """`{name_}{e000001 | 000010}_{index:02d}_{timestamp}{_seed}.png`."""
    progress = view.progress
    moment = f"e{progress.epoch:06d}" if event is Event.EPOCH else f"{progress.global_step:06d}"
    prefix = f"{name}_" if name else ""
    return f"{prefix}{moment}_{index:02d}_{stamp}{'' if seed is None else f'_{seed}'}.png"


@dataclass
class PreviewHook:
    """Generates the prompts of `--sample_prompts` with the weights as they are.

    trained: the module that owns the trained parameters; it leaves training mode for the pictures, or its dropout would
    show in them. conditioning: the encoded prompts when the text encoders do not change, else None (encoded anew each
    time). enabled: whether this process makes the pictures; the others wait for it. Pictures draw from generators of
    their own, so that training numbers do not depend on them.
    """

    bundle: ModelBundle
    trained: nn.Module
    requests: Sequence[GenRequest]
    conditioning: Any
    settings: Any
    folder: Path
    name: str | None
    device: torch.device
    text_form: TextForm
    wait: Callable[[], None]
    enabled: bool = True

    def __call__(self, event: Event, view: View) -> None:
        if is_due(event, view, self.settings):
            if self.enabled:
                self._make(event, view)
            self.wait()

    def _make(self, event: Event, view: View) -> None:
        parts = (self.bundle.unet, self.bundle.text_encoder_1, self.bundle.text_encoder_2, self.trained)
        modules = [module for module in parts if module is not None]
        was_training = [module.training for module in modules]
        stamp = time.strftime("%Y%m%d%H%M%S")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for module in modules:
                module.eval()
            with torch.no_grad():
                pictures = inference.generate(
                    self.bundle,
                    self.requests,
                    device=self.device,
                    conditioning=self.conditioning,
                    text_form=self.text_form,
                )
                for index, (request, picture) in enumerate(pictures):
                    target = file_name(event, view, name=self.name, index=index, seed=request.seed, stamp=stamp)
                    picture.save(self.folder / target)
        except (RuntimeError, ValueError, OSError, UserError) as error:
            # A picture is never worth the run: memory or disk may be short only now.
            log.warning(f"no sample pictures this time: {error}")
        finally:
            for module, training in zip(modules, was_training, strict=True):
                module.train(training)

"""Sample pictures during training."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from library.errors import UserError
from library.inference import launch as inference
from library.inference.controls import Controls
from library.inference.request import MAX_SEED, GenRequest
from library.inference.texts import TextForm
from library.inference.writer import png_text, save_png
from library.log import get_logger
from library.seeds import derive_seed
from library.training.contact_sheet import ContactSheet, Place
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


def with_fixed_seeds(requests: Sequence[GenRequest], run_seed: int) -> list[GenRequest]:
    """The requests with a seed for each that names none, so that its pictures of one run are comparable."""
    return [
        request if request.seed is not None else replace(request, seed=_seed(run_seed, number))
        for number, request in enumerate(requests)
    ]


def _seed(run_seed: int, number: int) -> int:
    return derive_seed(run_seed, "sample picture", number) % (MAX_SEED + 1)


@dataclass
class PreviewHook:
    """Generates the prompts of `--sample_prompts`.

    conditioning: the encoded prompts when the text encoders do not change, else None (encoded anew each time). scope:
    the state in which the run is judged; nothing that training computes depends on the pictures. sheet: shows them all,
    or None. controls: the networks that follow the prompts' control images. enabled: whether this process makes the
    pictures; the others wait for it.
    """

    bundle: ModelBundle
    requests: Sequence[GenRequest]
    conditioning: Any
    settings: Any
    folder: Path
    name: str | None
    device: torch.device
    text_form: TextForm
    scope: Callable[[], AbstractContextManager]
    wait: Callable[[], None]
    sheet: ContactSheet | None = None
    controls: Controls | None = None
    enabled: bool = True

    def __call__(self, event: Event, view: View) -> None:
        if event is Event.START and self.sheet is not None and self.enabled:
            self.sheet.take_up(view.progress.global_step)
        if is_due(event, view, self.settings):
            if self.enabled:
                self._make(event, view)
            self.wait()

    def _make(self, event: Event, view: View) -> None:
        stamp = time.strftime("%Y%m%d%H%M%S")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.scope():
                for index, (request, picture) in enumerate(self._pictures()):
                    seed = self.requests[index].seed
                    target = file_name(event, view, name=self.name, index=index, seed=seed, stamp=stamp)
                    place = Place(view.progress.global_step, index)
                    save_png(picture, self.folder / target, png_text(request) | place.text())
                    if self.sheet is not None:
                        self.sheet.add(place, picture)
            if self.sheet is not None:
                self.sheet.write()
        except (RuntimeError, ValueError, OSError, UserError) as error:
            # A picture is never worth the run: memory or disk may be short only now.
            log.warning(f"no sample pictures this time: {error}")

    def _pictures(self) -> Iterator[tuple[GenRequest, Image.Image]]:
        # Seeds that are not fixed are drawn here and not where the picture is, so that the file can tell them.
        requests = [
            request if request.seed is not None else replace(request, seed=secrets.randbelow(MAX_SEED + 1))
            for request in self.requests
        ]
        return inference.generate(
            self.bundle,
            requests,
            device=self.device,
            conditioning=self.conditioning or self.text_form,
            followers=[] if self.controls is None else [self.controls],
        )

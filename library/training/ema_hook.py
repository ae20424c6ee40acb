"""Where a run meets the average of its weights: making it, keeping it up to date, writing it to files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.training.ema import Decay, Ema
from library.training.hooks import Event, View
from library.training.naming import Names

if TYPE_CHECKING:
    from library.config.cli import RunConfig


def make_ema(cfg: RunConfig, trained: torch.nn.Module) -> Ema | None:
    """The average that a run asks for, over the tensors that it trains, on their device or the CPU; else None."""
    chosen = cfg.ema
    if not chosen.use_ema:
        return None
    decay = Decay(
        highest=chosen.ema_decay,
        lowest=chosen.ema_min_decay,
        after=chosen.ema_update_after_step,
        warmup=chosen.ema_warmup,
        inv_gamma=chosen.ema_inv_gamma,
        power=chosen.ema_power,
    )
    params = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    return Ema(params, decay, interval=chosen.ema_update_interval, on_cpu=chosen.ema_device == "cpu")


@dataclass
class EmaHook:
    """Takes every optimizer step into the average; the first hook, so that all others see it up to date.

    skipped: how many steps had a gradient that is not finite (0-d), which the average leaves out.
    """

    ema: Ema
    skipped: Callable[[], Tensor]
    _seen: Tensor | None = None

    def __call__(self, event: Event, view: View) -> None:
        if event is Event.START:
            self._seen = self.skipped().clone()
        elif event is Event.STEP:
            now = self.skipped().clone()
            self.ema.update(view.progress.global_step, was_skipped=now - self._seen)
            self._seen = now

    def watch(self, step: torch.nn.Module) -> None:
        """Have the weights copied before `step` ends its forward pass: they only change in or after the backward."""
        step.register_forward_hook(lambda *_: self.ema.before_weights_change())


@dataclass
class EmaFiles:
    """Writes model files as `--save_ema` says: `write(path, view)` writes the weights that are in place.

    kind: "also", "last", "only" or "none". The average beside a file `x.safetensors` is `x-ema.safetensors`.
    """

    write: Callable[[Path, View], None]
    ema: Ema
    names: Names
    kind: str

    def __call__(self, path: Path, view: View) -> None:
        for target, is_average in self._targets(path):
            if is_average:
                with self.ema.swapped():
                    self.write(target, view)
            else:
                self.write(target, view)

    def _targets(self, path: Path) -> Iterator[tuple[Path, bool]]:
        is_last = path == self.names.model(self.names.last_stem())
        yield path, self.kind == "only" or (self.kind == "last" and is_last)
        if self.kind == "also":
            yield self.names.ema_beside(path), True


def model_writer(writer: Callable[[Path, View], None], ema: Ema | None, names: Names, kind: str) -> Any:
    """`writer`, or what writes the average with it."""
    return writer if ema is None else EmaFiles(writer, ema, names, kind)

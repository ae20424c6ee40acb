"""The batches of a run, found before a model is loaded: all that an option about data can change."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from library.data.types import Batch
from library.models import checkpoint
from library.training import launch, prepare
from library.training.plan import schedule
from tests.e2e.options.observing import Seen, config_of, logged, reset_accelerate, trainable_of


class _Enough(Exception):
    """The model would be loaded now."""


def observe_batches(run: str, folder: Path, patch: Any, name: str, options: dict[str, Any]) -> Seen:
    """As `observe`, up to the model: `steps` has the micro-batches of each step, as hashes of all they hold."""

    def load(*arguments: Any, **more: Any) -> Any:
        raise _Enough

    cfg, seen, built = config_of(run, folder, name, options), Seen(), []
    build = prepare.build_train_data
    with patch.context() as inner, logged(seen.log):
        inner.setattr(prepare, "build_train_data", lambda *a, **k: built.append(build(*a, **k)) or built[-1])
        inner.setattr(checkpoint, "load_bundle", load)
        with contextlib.suppress(_Enough):
            launch.train(cfg, trainable_of(run, cfg))
        reset_accelerate()
        (data,) = built
        length = schedule(data, max_train_steps=cfg.loop.max_train_steps, max_train_epochs=cfg.loop.max_train_epochs)
        data.set_length(length.total_steps)
        seen.steps = list(_steps(data, length.total_steps))
    return seen


def _steps(data: Any, count: int) -> Iterator[dict[str, Any]]:
    done = epoch = 0
    while done < count:
        for group in data.epoch(epoch):
            yield {"samples": group.samples, "batches": [_hash(batch) for batch in group.micro_batches]}
            done += 1
            if done == count:
                break
        epoch += 1


def _hash(batch: Batch) -> str:
    found = hashlib.sha256()
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        for item in vars(value).values() if field.name == "tokens" and value is not None else [value]:
            found.update(f"{field.name} {item if not isinstance(item, torch.Tensor) else item.shape}".encode())
            if isinstance(item, torch.Tensor):
                found.update(item.contiguous().numpy().tobytes())
    return found.hexdigest()

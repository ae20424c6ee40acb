"""What the stages of a launch hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from library.data.dataset import TrainData
from library.training.draws import Draws
from library.training.ema import Ema
from library.training.hooks import View
from library.training.plan import Schedule
from library.training.state import TrainingState
from library.training.trainable import Trainable
from library.training.update import Update

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.models.bundle import ModelBundle


@dataclass
class Run:
    """What is trained on and with: settings, data, base model. previews: the sample pictures that are asked for.

    preview_conditioning: their encoded prompts, or None where the text encoders change and they are encoded anew.
    """

    cfg: RunConfig
    accelerator: Accelerator
    trainable: Trainable
    seed: int
    data: TrainData
    bundle: ModelBundle
    latents_cached: bool = False
    text_cached: bool = False
    previews: list | None = None
    preview_conditioning: Any = None


@dataclass
class Parts:
    """What a run trains and steps, put together for its hooks.

    trained: the module that owns the trained parameters. step: the wrapped `TrainStep`.
    length: how many steps and epochs. state: all that is saved for --resume. ema: the average of the trained weights.
    """

    trained: torch.nn.Module
    step: torch.nn.Module
    draws: Draws
    optimizer: Any
    scheduler: Any
    update: Update
    length: Schedule
    view: View
    state: TrainingState
    ema: Ema | None = None

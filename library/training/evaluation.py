"""The state in which a run is judged: validation and sample pictures look at the weights through this one door."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from library.training.optim import evaluation_mode
from library.training.run import Parts, Run


@contextmanager
def evaluation(run: Run, parts: Parts, *, averaged: bool) -> Iterator[None]:
    """Weights and modules as they should be judged; afterwards everything is as before, also after an error.

    No gradients, every module in eval mode, the global random generators put back, and with `averaged` the moving
    average (--use_ema) in the place of the weights. It holds nothing that ranks must do together.
    """
    bundle = run.bundle
    modules = (bundle.unet, bundle.text_encoder_1, bundle.text_encoder_2, parts.trained, parts.step)
    with ExitStack() as stack:
        stack.enter_context(kept_random_state())
        stack.enter_context(eval_mode(modules))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(parts.optimizer))
        if averaged:
            assert parts.ema is not None, "--use_ema makes the average"
            stack.enter_context(parts.ema.swapped())
        yield


@contextmanager
def eval_mode(modules: Iterable[nn.Module | None]) -> Iterator[None]:
    """The modules and all within them in eval mode; afterwards each is in the mode that it was in."""
    inside = [part for module in modules if module is not None for part in module.modules()]
    were_training = [part for part in inside if part.training]
    try:
        for part in were_training:
            part.training = False
        yield
    finally:
        for part in were_training:
            part.training = True


@contextmanager
def kept_random_state() -> Iterator[None]:
    """The global generators of Python, NumPy and torch (all CUDA devices) are afterwards as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

"""Puts a run together: what is trained, the wrapped step, optimizer, schedule, state and hooks."""

from __future__ import annotations

import warnings
from datetime import datetime
from functools import partial
from typing import Any

import torch

from library.errors import UserError
from library.log import get_logger
from library.models import memory
from library.training import early
from library.training.broken_steps import BrokenSteps, image_name
from library.training.build_update import build_update
from library.training.draws import Draws
from library.training.ema_hook import make_ema
from library.training.hook_list import hooks as make_hooks
from library.training.hooks import View
from library.training.metrics import Meters
from library.training.objective import Objective
from library.training.plan import end_text, plan_text, schedule
from library.training.precision import cast_trained, precision_text, store_frozen, trained_dtype
from library.training.run import Parts, Run
from library.training.state import Progress, RunFacts, TrainingState, data_identity
from library.training.step import TrainStep
from library.training.trainable import ParamGroup
from library.training.trainer import Trainer

log = get_logger(__name__)


def assemble(run: Run) -> tuple[Trainer, TrainingState]:
    """Attach what is trained, wrap the step, and make optimizer, schedule, state and hooks."""
    cfg, accelerator = run.cfg, run.accelerator
    trained, groups = _attach(run)
    with warnings.catch_warnings():  # accelerate names it to PyTorch whatever it is
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        step = accelerator.prepare_model(_step(run, trained))
    length = schedule(
        run.data,
        max_train_steps=cfg.loop.max_train_steps,
        max_train_epochs=cfg.loop.max_train_epochs,
    )
    run.data.set_length(length.total_steps)
    optimizer = early.optimizer(cfg, groups)
    scheduler = early.scheduler(cfg, optimizer, total_steps=length.total_steps)
    view = View(Progress(), length.total_steps, length.num_epochs, _meters(run, length.total_steps))
    update = build_update(
        cfg,
        early.optimizer,
        optimizer,
        scaler=accelerator.scaler,
        run_seed=run.seed,
        global_step=lambda: view.progress.global_step,
    )
    ema = make_ema(cfg, trained)
    state = _state(run, trained, optimizer, scheduler, view)
    if ema is not None:
        state.others["ema"] = ema
    draws = Draws.of(cfg, run.seed)
    parts = Parts(trained, step, draws, optimizer, scheduler, update, length, view, state, ema)
    announce = partial(_say_plan, run, parts)
    trainer = Trainer(
        accelerator, step, run.trainable, run.data, draws, update, scheduler, view, make_hooks(run, parts), announce
    )
    return trainer, state


def _attach(run: Run) -> tuple[torch.nn.Module, list[ParamGroup]]:
    """The module that owns the trained parameters, in the frozen base, and the optimizer's groups."""
    memory.freeze(run.bundle)
    store_frozen(run.cfg, run.bundle, with_text=not run.text_cached)
    # Initial adapter weights come from the global generator: seed it, so that ranks and repeated runs agree.
    torch.manual_seed(run.seed)
    trained = run.trainable.attach(run.bundle)
    if run.cfg.loop.gradient_checkpointing:
        memory.enable_gradient_checkpointing(run.bundle, text_encoders=bool(run.trainable.trains & {"te1", "te2"}))
    groups = run.trainable.param_groups()
    if not groups:
        raise UserError(
            "nothing is left to train",
            where="--learning_rate and the rates of the parts",
            fix="give the parts that should train a rate above 0",
        )
    cast_trained(trained.parameters(), trained_dtype(run.cfg))
    return trained, groups


def _step(run: Run, trained: torch.nn.Module) -> TrainStep:
    objective = Objective.of(run.cfg)
    return TrainStep(run.bundle, run.trainable, trained, objective=objective, with_text=not run.text_cached).train()


def _meters(run: Run, total_steps: int) -> Meters:
    broken = BrokenSteps(has_scaler=run.accelerator.scaler is not None, name_of=partial(image_name, run.data.table))
    return Meters(run.cfg.loop.log_every_n_steps, total_steps, broken=broken)


def _state(run: Run, trained: torch.nn.Module, optimizer: Any, scheduler: Any, view: View) -> TrainingState:
    facts = RunFacts(
        run_seed=run.seed,
        data=data_identity(
            run.data.pools,
            world=run.accelerator.num_processes,
            weights=[] if run.data.epochs_are_equal else [spec.weights for spec in run.data.specs],
        ),
        accumulation=run.cfg.loop.gradient_accumulation_steps,
    )
    others = {"optimizer": optimizer, "scheduler": scheduler, "meters": view.meters}
    if run.accelerator.scaler is not None:
        others["scaler"] = run.accelerator.scaler
    return TrainingState(view.progress, facts, trained, others)


def _say_plan(run: Run, parts: Parts, seconds_per_step: float | None) -> None:
    cfg, accelerator, length = run.cfg, run.accelerator, parts.length
    sizes = sorted({spec.batch_size for spec in run.data.specs})
    batch = (
        f"{'/'.join(map(str, sizes))} x {cfg.loop.gradient_accumulation_steps} accumulated x "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
    precision = precision_text(cfg)
    end = end_text(seconds_per_step, length.total_steps - parts.view.progress.global_step, now=datetime.now())
    summary = run.data.summary()
    log.info(summary.text())
    log.info(plan_text(summary, parts.optimizer.param_groups, length, batch=batch, precision=precision, end=end))

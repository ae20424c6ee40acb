"""The hooks of a run, in the order in which they fire."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator

from library.training import metadata as meta
from library.training import naming, prediction
from library.training.contact_sheet import ContactSheet
from library.training.ema import Ema
from library.training.ema_hook import EmaHook, model_writer
from library.training.evaluation import evaluation
from library.training.hooks import Hook
from library.training.log_hooks import DrainHook, LogHook
from library.training.metrics import RunLog
from library.training.optim import evaluated
from library.training.precision import save_dtype
from library.training.prepare import text_form
from library.training.preview import PreviewHook, with_fixed_seeds
from library.training.run import Parts, Run
from library.training.save_hook import SaveHook
from library.training.state import read_description
from library.training.stop_hooks import NonFiniteHook, StopHook
from library.training.trainable import ExportsNetwork
from library.training.validation import Validation
from library.training.validation_hook import ValidationHook
from library.training.writing import CheckpointWriter, ModelWriter, checkpoint_format

if TYPE_CHECKING:
    from library.config.cli import RunConfig


def hooks(run: Run, parts: Parts) -> list[Hook]:
    """Everything that happens around the steps of `run`, on every rank."""
    every = run.cfg.loop.log_every_n_steps
    meters: LogHook | DrainHook
    meters = LogHook(_run_log(run.cfg), every) if run.accelerator.is_main_process else DrainHook(every)
    found = [_stop(run), NonFiniteHook(lambda: parts.update.skipped, every), meters, _save(run, parts, meters)]
    if run.data.validation is not None:
        found.insert(-1, _validation(run, parts, meters))  # before saving, so that the log is complete at every save
    if parts.ema is not None:
        found.insert(0, _ema(parts, parts.ema))
    if run.previews:
        found.append(_preview(run, parts))
    return found


def _stop(run: Run) -> StopHook:
    return StopHook(None if run.accelerator.num_processes == 1 else partial(_any_rank, run.accelerator))


def _save(run: Run, parts: Parts, meters: LogHook | DrainHook) -> SaveHook:
    cfg, accelerator = run.cfg, run.accelerator
    writer = _writer(run, parts)
    is_folder = isinstance(writer, CheckpointWriter) and writer.save_as == "diffusers"
    period = cfg.save.save_every_n_epochs
    if cfg.save.save_n_epoch_ratio:
        period = naming.save_period_from_ratio(parts.length.num_epochs, cfg.save.save_n_epoch_ratio)
    names = naming.Names(Path(cfg.save.output_dir), cfg.save.output_name, "" if is_folder else ".safetensors")
    save_model = model_writer(writer, parts.ema, names, cfg.ema.save_ema)
    return SaveHook(
        names,
        cfg.save.model_copy(update={"save_every_n_epochs": period}),
        save_model=partial(_on_main, accelerator, evaluated(parts.optimizer, save_model)),
        save_state=partial(_on_main, accelerator, parts.state.save),
        flush=meters.flush,
        is_main=accelerator.is_main_process,
    )


def _ema(parts: Parts, ema: Ema) -> EmaHook:
    hook = EmaHook(ema, lambda: parts.update.skipped)
    hook.watch(parts.step)
    return hook


def _validation(run: Run, parts: Parts, meters: LogHook | DrainHook) -> ValidationHook:
    cfg = run.cfg.validation
    return ValidationHook(
        Validation.of(run, parts),
        cfg,
        scope=partial(evaluation, run, parts, averaged=cfg.validate_with_ema),
        note=meters.note,
    )


def _writer(run: Run, parts: Parts) -> ModelWriter | CheckpointWriter:
    cfg, dtype = run.cfg, save_dtype(run.cfg.save.save_precision)
    if run.trainable.owns:
        return CheckpointWriter(run.bundle, save_as=checkpoint_format(cfg, run.bundle), dtype=dtype, cfg=cfg)
    trainable = cast(ExportsNetwork, run.trainable)
    metadata = _metadata(run, parts, trainable.metadata())
    return ModelWriter(trainable, dtype=dtype, metadata=metadata, cfg=cfg, bundle=run.bundle)


def _preview(run: Run, parts: Parts) -> PreviewHook:
    cfg, accelerator, requests = run.cfg, run.accelerator, run.previews or []
    folder, sheet = Path(cfg.save.output_dir) / "sample", None
    if cfg.preview.sample_grid:
        requests = with_fixed_seeds(requests, run.seed)
        prefix = f"{cfg.save.output_name}_" if cfg.save.output_name else ""
        sheet = ContactSheet(folder, prefix, [request.prompt for request in requests])
    return PreviewHook(
        run.bundle,
        requests,
        run.preview_conditioning,
        cfg.preview,
        folder,
        cfg.save.output_name,
        accelerator.device,
        text_form(cfg),
        scope=partial(evaluation, run, parts, averaged=cfg.preview.sample_with_ema),
        wait=accelerator.wait_for_everyone,
        sheet=sheet,
        enabled=accelerator.is_main_process,
    )


def _on_main(accelerator: Accelerator, write: Callable[..., None], *arguments: Any) -> None:
    if accelerator.is_main_process:
        write(*arguments)
    accelerator.wait_for_everyone()


def _any_rank(accelerator: Accelerator, seen: bool) -> bool:
    flag = torch.tensor(float(seen), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())


def _run_log(cfg: RunConfig) -> RunLog:
    resumed_step = read_description(Path(cfg.loop.resume))["progress"]["global_step"] if cfg.loop.resume else 0
    output = Path(cfg.save.output_dir)
    folder = Path(cfg.loop.logging_dir) if cfg.loop.logging_dir else output / "logs"
    tensorboard = folder / f"{cfg.loop.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
    return RunLog(output / f"{cfg.save.output_name or 'last'}-log.jsonl", tensorboard, resumed_step=resumed_step)


def _metadata(run: Run, parts: Parts, own: dict[str, str]) -> dict[str, str]:
    cfg, data = run.cfg, run.data
    summary = data.summary()
    description = meta.RunDescription(
        session_id=str(uuid.uuid4().int % 2**32),
        started_at=time.time(),
        seed=run.seed,
        optimizer=meta.optimizer_text(parts.optimizer, cfg.optim.optimizer_kwargs()),
        num_train_images=summary.num_train_images,
        num_reg_images=summary.num_reg_images,
        num_validation_images=summary.held_out,
        num_batches_per_epoch=data.batches_per_epoch,
        num_epochs=parts.length.num_epochs,
        max_train_steps=parts.length.total_steps,
    )
    return meta.network_metadata(
        prediction.effective(cfg.flat(), run.bundle),
        description,
        data.ss_metadata(user_config=bool(cfg.data.dataset_config)),
        own,
    )

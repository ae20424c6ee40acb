"""The hooks of a run, in the order in which they fire."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator

from library.config.effective import config_lines
from library.errors import UserError
from library.io.atomic import write_text
from library.training import metadata as meta
from library.training import naming, prediction
from library.training.contact_sheet import ContactSheet
from library.training.ema import Ema
from library.training.ema_hook import EmaHook, model_writer
from library.training.evaluation import evaluation
from library.training.export_check import ExportCheck
from library.training.hooks import Hook, Paused
from library.training.log_hooks import DrainHook, LogHook
from library.training.metrics import RunLog
from library.training.optim import evaluated
from library.training.precision import save_dtype
from library.training.prepare import text_form
from library.training.preview import PreviewHook, with_fixed_seeds
from library.training.requests import RequestFiles
from library.training.run import Parts, Run
from library.training.save_hook import SaveHook
from library.training.save_plan import check_space, save_settings
from library.training.saving import Attempts
from library.training.state import read_description
from library.training.stop_hooks import NonFiniteHook, StopHook
from library.training.token_files import TokenWriter, WithTokens
from library.training.trackers import open_trackers
from library.training.trainable import ExportsNetwork, FollowsImages
from library.training.validation import Validation
from library.training.validation_hook import ValidationHook
from library.training.writing import CheckpointWriter, ModelWriter, checkpoint_format

if TYPE_CHECKING:
    from library.config.cli import RunConfig


def hooks(run: Run, parts: Parts) -> list[Hook]:
    """Everything that happens around the steps of `run`, on every rank."""
    every = run.cfg.loop.log_every_n_steps
    if run.accelerator.is_main_process:
        check_space(run, parts)
    meters: LogHook | DrainHook
    meters = _log(run.cfg) if run.accelerator.is_main_process else DrainHook(every)
    found = [_stop(run), meters, NonFiniteHook(run.cfg.loop.max_nonfinite_steps), _save(run, parts, meters)]
    if run.data.validation is not None:
        # Before saving, so that the log is complete at every save.
        found.insert(-1, Paused(_validation(run, parts, meters)))
    if parts.ema is not None:
        found.insert(0, _ema(parts, parts.ema))
    if run.previews:
        found.append(Paused(_preview(run, parts)))
    found += getattr(run.trainable, "hooks", list)()  # last: what an epoch begins with comes after what ends it
    return found


def _stop(run: Run) -> StopHook:
    files = RequestFiles(Path(run.cfg.save.output_dir)) if run.accelerator.is_main_process else None
    agree = None if run.accelerator.num_processes == 1 else partial(_any_rank, run.accelerator)
    return StopHook(agree, files, has_prompts=bool(run.previews))


def _save(run: Run, parts: Parts, meters: LogHook | DrainHook) -> SaveHook:
    cfg, accelerator = run.cfg, run.accelerator
    writer = _writer(run, parts)
    is_folder = isinstance(writer, CheckpointWriter) and writer.save_as == "diffusers"
    extension = getattr(writer, "extension", "" if is_folder else ".safetensors")
    names = naming.Names(Path(cfg.save.output_dir), cfg.save.output_name, extension)
    save_model = model_writer(writer, parts.ema, names, cfg.ema.save_ema)
    return SaveHook(
        names,
        save_settings(run, parts),
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


def _writer(run: Run, parts: Parts) -> Callable[..., None]:
    cfg, dtype = run.cfg, save_dtype(run.cfg.save.save_precision)
    if run.trainable.owns:
        return CheckpointWriter(run.bundle, save_as=checkpoint_format(cfg, run.bundle), dtype=dtype, cfg=cfg)
    tokens = getattr(run.trainable, "tokens", None)
    embeddings = TokenWriter(tokens, dtype=dtype, cfg=cfg, bundle=run.bundle) if tokens is not None else None
    if embeddings is not None and not hasattr(run.trainable, "export"):
        return embeddings
    trainable = cast(ExportsNetwork, run.trainable)
    metadata = _metadata(run, parts, trainable.metadata())
    check = None
    if hasattr(trainable, "read_saved"):
        autocast = run.accelerator.autocast
        check = ExportCheck(trainable, run.bundle, with_text=not run.text_cached, autocast=autocast)
    writer = ModelWriter(trainable, dtype=dtype, metadata=metadata, cfg=cfg, bundle=run.bundle, check=check)
    return writer if embeddings is None else WithTokens(writer, embeddings)


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
        controls=run.trainable.controls() if isinstance(run.trainable, FollowsImages) else None,
        enabled=accelerator.is_main_process,
    )


def _on_main(accelerator: Accelerator, write: Callable[..., None], path: Path, *arguments: Any) -> UserError | None:
    """Write on the main process, with its attempts; the others wait."""
    failure = Attempts()(path, partial(write, path, *arguments)) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    return failure


def _any_rank(accelerator: Accelerator, seen: Sequence[bool]) -> list[bool]:
    flags = torch.tensor(seen, dtype=torch.float32, device=accelerator.device)
    return [bool(count) for count in accelerator.reduce(flags, reduction="sum").tolist()]


def _log(cfg: RunConfig) -> LogHook:
    resumed_step = read_description(Path(cfg.loop.resume))["progress"]["global_step"] if cfg.loop.resume else 0
    output, base = Path(cfg.save.output_dir), cfg.save.output_name or "last"
    write_text(output / f"{base}-config.toml", "\n".join(config_lines(cfg)))
    run_log = RunLog(output / f"{base}-log.jsonl", open_trackers(cfg), resumed_step=resumed_step)
    return LogHook(run_log, cfg.loop.log_every_n_steps, output / f"{base}-curves.png")


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

"""Composition root of training: settings in, a finished run out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from library.config.dataset_file import dataset_specs
from library.data.cache_places import index_folder
from library.data.dataset import TrainData, build_train_data
from library.errors import UserError
from library.inference import encode_pass
from library.inference import launch as inference
from library.inference.texts import TextForm
from library.log import get_logger
from library.models import attention, checkpoint, memory
from library.models.families import sdxl
from library.models.tokenizers import load_tokenizer
from library.training import early, naming
from library.training import metadata as meta
from library.training.draws import Draws
from library.training.hooks import DrainHook, LogHook, NonFiniteHook, SaveHook, StopHook, View
from library.training.metrics import Meters, RunLog
from library.training.objective import Objective
from library.training.plan import Schedule, end_text, plan_text, schedule
from library.training.precision import save_dtype, weight_dtype
from library.training.preview import PreviewHook
from library.training.state import Progress, RunFacts, TrainingState, data_identity, read_description
from library.training.step import TrainStep
from library.training.trainable import Trainable
from library.training.trainer import Trainer
from library.training.update import GuardedUpdate
from library.training.writing import ModelWriter

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.models.bundle import ModelBundle

log = get_logger(__name__)


@dataclass
class Run:
    """What the stages of a launch hand to each other."""

    cfg: RunConfig
    accelerator: Accelerator
    trainable: Trainable
    seed: int
    data: TrainData
    bundle: ModelBundle
    latents_cached: bool
    text_cached: bool
    previews: list
    preview_conditioning: Any


def train(cfg: RunConfig, trainable: Trainable) -> Progress:
    """Train `trainable` as `cfg` says, on every process that the launcher started; returns where the run ended.

    Raises UserError for everything a user can mend, as early as it can be known.
    """
    for notice in cfg.notices:
        log.info(notice)
    accelerator = _accelerator(cfg, trainable)
    early.check(cfg, accelerator)
    run = _prepare(cfg, trainable, accelerator)
    trainer, state = _assemble(run)
    if cfg.loop.resume:
        _resume(Path(cfg.loop.resume), state, trainer.update.optimizer)
    try:
        trainer.run()
        trainer.data.finish_filling()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU ran out of memory: {str(error).splitlines()[0]}",
            where=f"step {trainer.view.progress.global_step + 1}",
            fix="use --gradient_checkpointing, --mixed_precision bf16, --cache_latents, --cache_text_encoder_outputs "
            "with --network_train_unet_only, a smaller --train_batch_size or a smaller --resolution",
        ) from error
    finally:
        trainer.data.close()
    accelerator.end_training()
    return trainer.view.progress


def _accelerator(cfg: RunConfig, trainable: Trainable) -> Accelerator:
    on_cpu = not torch.cuda.is_available()
    if on_cpu and cfg.loop.mixed_precision == "fp16":
        raise UserError("fp16 mixed precision needs a GPU", where="--mixed_precision fp16", fix='use "no" or "bf16"')
    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=trainable.may_skip_modules, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    return Accelerator(mixed_precision=cfg.loop.mixed_precision, cpu=on_cpu, kwargs_handlers=[ddp])


def _resume(folder: Path, state: TrainingState, optimizer: torch.optim.Optimizer) -> None:
    """Load the state, and say what of it overrules this run's settings or cannot be exact."""

    def rates() -> list[float | None]:
        return [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]

    asked = rates()
    sentences = state.load(folder)
    if rates() != asked:
        sentences.append(
            f"the learning rates are the state's {rates()}, not {asked} of this run; to change them, start from its "
            "weights with --network_weights instead"
        )
    for sentence in sentences:
        log.warning(f"--resume {folder}: {sentence}")


def _prepare(cfg: RunConfig, trainable: Trainable, accelerator: Accelerator) -> Run:
    """Data, previews and base model, checked in the order of what costs least; caches are built."""
    seed = early.agreed_seed(cfg, accelerator)
    specs = dataset_specs(cfg)
    previews = early.preview_requests(cfg, specs[0].resolution)
    tokenizer, max_token_length, weighted = load_tokenizer(), cfg.model.max_token_length, cfg.model.weighted_captions
    data = build_train_data(
        specs,
        seed=seed,
        tokenize=partial(sdxl.tokenize, tokenizer, max_token_length=max_token_length, weighted=weighted),
        count_tokens=partial(sdxl.count_tokens, tokenizer, weighted=weighted),
        max_token_length=max_token_length,
        world=accelerator.num_processes,
        rank=accelerator.process_index,
        accumulation=cfg.loop.gradient_accumulation_steps,
        num_workers=cfg.data.max_data_loader_n_workers,
        persistent_workers=cfg.data.persistent_data_loader_workers,
        legacy_crop=cfg.data.legacy_crop_conditioning,
        cache_dir=index_folder(cfg),
    )
    dtype = weight_dtype(cfg.loop.mixed_precision)
    # One process of a machine reads the file first: the others then find it in the page cache.
    with accelerator.local_main_process_first():
        bundle = checkpoint.load_bundle(
            cfg.model.pretrained_model_name_or_path,
            vae=cfg.model.vae,
            dtype=dtype,
            vae_dtype=torch.float32 if cfg.model.no_half_vae else dtype,
            disable_mmap=cfg.model.disable_mmap_load_safetensors,
        )
    _check_prediction_type(cfg, bundle)
    Objective.of(cfg).check(bundle.prediction_type)  # before caches are filled
    memory.configure_vae(bundle.vae, slicing=cfg.model.vae_slicing, tiling=cfg.model.vae_tiling)
    attention.configure(bundle.unet, xformers=cfg.model.xformers, device=accelerator.device)
    run = Run(cfg, accelerator, trainable, seed, data, bundle, False, False, previews, None)
    _fill_caches(run)
    return run


def _check_prediction_type(cfg: RunConfig, bundle: ModelBundle) -> None:
    wanted = "v_prediction" if cfg.model.v_parameterization else None
    if wanted and bundle.prediction_type != wanted:
        log.info("training with v-prediction, as --v_parameterization says")
        bundle.prediction_type = wanted
    elif bundle.prediction_type == "v_prediction" and not cfg.model.v_parameterization:
        raise UserError(
            "the checkpoint is a v-prediction model",
            where=f"--pretrained_model_name_or_path {cfg.model.pretrained_model_name_or_path}",
            fix="add --v_parameterization",
        )


def _text_form(cfg: RunConfig) -> TextForm:
    """Prompts of sample pictures are encoded as captions are."""
    return TextForm("train", max_chunks=(cfg.model.max_token_length or 75) // 75)


def _fill_caches(run: Run) -> None:
    """Latents and text outputs, as asked; afterwards the encoders that are not needed leave the device."""
    cfg, accelerator, bundle = run.cfg, run.accelerator, run.bundle
    place = {
        "cfg": cfg,
        "device": accelerator.device,
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
    }
    if cfg.data.cache_in_background:
        encode_pass.fill_latents(bundle, run.data, **place)
        run.latents_cached = True
    elif cfg.data.cache_latents:
        store, report = encode_pass.cache_latents_pass(bundle, run.data, **place)
        run.data.attach_latents(store)
        run.latents_cached = True
        log.info(report.text("latents"))
        bundle.vae.to("cpu")
    else:
        bundle.vae.to(accelerator.device)
    trains_text = bool(run.trainable.trains & {"te1", "te2"})
    if cfg.data.cache_text_encoder_outputs:
        store, report = encode_pass.cache_text_pass(bundle, run.data, **place)
        run.data.attach_text(store)
        run.text_cached = True
        log.info(report.text("text encoder outputs"))
    if run.previews and not trains_text:
        run.preview_conditioning = inference.encode_requests(
            bundle, run.previews, device=accelerator.device, text_form=_text_form(cfg)
        )
    if run.text_cached:
        for encoder in (bundle.text_encoder_1, bundle.text_encoder_2):
            encoder.to("cpu")


def _assemble(run: Run) -> tuple[Trainer, TrainingState]:
    """Attach, wrap, optimizer, schedule, hooks."""
    cfg, accelerator, bundle, trainable = run.cfg, run.accelerator, run.bundle, run.trainable
    memory.freeze(bundle)
    # Initial adapter weights come from the global generator: seed it, so that ranks and repeated runs agree.
    torch.manual_seed(run.seed)
    trained = trainable.attach(bundle)
    if cfg.loop.gradient_checkpointing:
        memory.enable_gradient_checkpointing(bundle, text_encoders=bool(trainable.trains & {"te1", "te2"}))
    groups = trainable.param_groups()
    if not groups:
        raise UserError(
            "nothing is left to train",
            where="--learning_rate, --unet_lr, --text_encoder_lr",
            fix="give the parts that should train a rate above 0",
        )
    step = TrainStep(bundle, trainable, trained, objective=Objective.of(cfg), with_text=not run.text_cached)
    step.train()
    wrapped = accelerator.prepare_model(step)
    length = schedule(
        run.data,
        max_train_steps=cfg.loop.max_train_steps,
        max_train_epochs=cfg.loop.max_train_epochs,
    )
    run.data.set_length(length.total_steps)
    optimizer = early.optimizer(cfg, groups)
    scheduler = early.scheduler(cfg, optimizer, total_steps=length.total_steps)
    update = GuardedUpdate(optimizer, cfg.optim.max_grad_norm, accelerator.scaler)
    view = View(Progress(), length.total_steps, length.num_epochs, Meters())
    state = _state(run, trained, optimizer, scheduler, view)
    hooks = _hooks(run, view, state, optimizer, length, update)
    draws = Draws.of(cfg, run.seed)
    say_plan = partial(_say_plan, run, optimizer.param_groups, length, view)
    trainer = Trainer(accelerator, wrapped, trainable, run.data, draws, update, scheduler, view, hooks, say_plan)
    return trainer, state


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


def _say_plan(run: Run, groups: list, length: Schedule, view: View, seconds_per_step: float | None) -> None:
    cfg, accelerator = run.cfg, run.accelerator
    sizes = sorted({spec.batch_size for spec in run.data.specs})
    batch = (
        f"{'/'.join(map(str, sizes))} x {cfg.loop.gradient_accumulation_steps} accumulated x "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
    frozen = str(weight_dtype(cfg.loop.mixed_precision)).removeprefix("torch.")
    precision = f"mixed precision {cfg.loop.mixed_precision}, frozen weights {frozen}"
    end = end_text(seconds_per_step, length.total_steps - view.progress.global_step, now=datetime.now())
    summary = run.data.summary()
    log.info(summary.text())
    if summary.held_out:
        log.info("the images held out for validation are not trained on; no validation loss is computed yet")
    log.info(plan_text(summary, groups, length, batch=batch, precision=precision, end=end))


def _hooks(
    run: Run, view: View, state: TrainingState, optimizer: Any, length: Schedule, update: GuardedUpdate
) -> list[Any]:
    cfg, accelerator = run.cfg, run.accelerator
    every = cfg.loop.log_every_n_steps
    stop = StopHook(None if accelerator.num_processes == 1 else partial(_any_rank, accelerator))
    hooks: list[Any] = [stop, NonFiniteHook(lambda: update.skipped, every)]
    names = naming.Names(Path(cfg.save.output_dir), cfg.save.output_name)
    if accelerator.is_main_process:
        resumed = read_description(Path(cfg.loop.resume))["progress"]["global_step"] if cfg.loop.resume else 0
        meter_hook: LogHook | DrainHook = LogHook(_run_log(cfg, resumed), every)
    else:
        meter_hook = DrainHook(every)
    hooks.append(meter_hook)
    writer = ModelWriter(
        run.trainable,
        dtype=save_dtype(cfg.save.save_precision),
        metadata=_metadata(run, optimizer, length),
        cfg=cfg,
        bundle=run.bundle,
    )
    period = cfg.save.save_every_n_epochs
    if cfg.save.save_n_epoch_ratio:
        period = naming.save_period_from_ratio(length.num_epochs, cfg.save.save_n_epoch_ratio)
    hooks.append(
        SaveHook(
            names,
            cfg.save.model_copy(update={"save_every_n_epochs": period}),
            save_model=partial(_on_main, accelerator, writer),
            save_state=partial(_on_main, accelerator, state.save),
            flush=meter_hook.flush,
            is_main=accelerator.is_main_process,
        )
    )
    if run.previews:
        hooks.append(
            PreviewHook(
                run.bundle,
                state.trained,
                run.previews,
                run.preview_conditioning,
                cfg.preview,
                Path(cfg.save.output_dir) / "sample",
                cfg.save.output_name,
                accelerator.device,
                _text_form(cfg),
                accelerator.wait_for_everyone,
                enabled=accelerator.is_main_process,
            )
        )
    return hooks


def _on_main(accelerator: Accelerator, write: Callable[..., None], *arguments: Any) -> None:
    if accelerator.is_main_process:
        write(*arguments)
    accelerator.wait_for_everyone()


def _any_rank(accelerator: Accelerator, seen: bool) -> bool:
    flag = torch.tensor(float(seen), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())


def _run_log(cfg: RunConfig, resumed_step: int) -> RunLog:
    output = Path(cfg.save.output_dir)
    folder = Path(cfg.loop.logging_dir) if cfg.loop.logging_dir else output / "logs"
    tensorboard = folder / f"{cfg.loop.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
    return RunLog(output / f"{cfg.save.output_name or 'last'}-log.jsonl", tensorboard, resumed_step=resumed_step)


def _metadata(run: Run, optimizer: Any, length: Schedule) -> dict[str, str]:
    cfg, data = run.cfg, run.data
    summary = data.summary()
    description = meta.RunDescription(
        session_id=str(uuid.uuid4().int % 2**32),
        started_at=time.time(),
        seed=run.seed,
        optimizer=meta.optimizer_text(optimizer, cfg.optim.optimizer_kwargs()),
        num_train_images=summary.num_train_images,
        num_reg_images=summary.num_reg_images,
        num_validation_images=summary.held_out,
        num_batches_per_epoch=data.batches_per_epoch,
        num_epochs=length.num_epochs,
        max_train_steps=length.total_steps,
    )
    return meta.network_metadata(
        cfg.flat(),
        description,
        data.ss_metadata(user_config=bool(cfg.data.dataset_config)),
        run.trainable.export(None).metadata,
    )

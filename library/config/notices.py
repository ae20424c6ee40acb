"""Sentences about settings that are legal but do less than they seem to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from library.config.fields import FULL, NETWORK, TRAINER
from library.config.run_config import RunConfig


def notices(cfg: RunConfig) -> list[str]:
    """What to tell the user about this run before it starts."""
    if "loop" not in cfg.groups:
        return list(_generation(cfg))
    found = list(_data(cfg))
    if cfg.run in TRAINER:
        found += [sentence for part in _TRAINING for sentence in part(cfg)]
    if cfg.run in NETWORK:
        found += list(_network(cfg))
    if cfg.run in FULL:
        found += list(_finetune(cfg))
    return found


def _data(cfg: RunConfig) -> Iterator[str]:
    for name in ("train_data_dir", "reg_data_dir", "in_json"):
        if cfg.data.dataset_config and cfg.get(name):
            yield f"{name} is ignored: the data is named by dataset_config"
    are_folders = not cfg.data.dataset_config and not cfg.data.in_json
    if cfg.data.train_data_dir and are_folders and cfg.is_given("dataset_repeats"):
        yield "dataset_repeats has no effect: the folder names in train_data_dir say the repeats"
    if cfg.is_given("token_warmup_min") and not cfg.data.token_warmup_step and not cfg.data.dataset_config:
        yield "token_warmup_min has no effect: it acts with token_warmup_step"


def _model(cfg: RunConfig) -> Iterator[str]:
    if cfg.model.clip_skip is not None:
        yield "clip_skip is only recorded: SDXL always uses the penultimate layer of its text encoders"
    if cfg.model.sdpa and cfg.model.xformers:
        yield "sdpa and xformers are both set: xformers is used"


def _length(cfg: RunConfig) -> Iterator[str]:
    if cfg.loop.max_train_epochs and cfg.is_given("max_train_steps"):
        yield "max_train_steps is ignored: max_train_epochs takes its place"
    if cfg.data.persistent_data_loader_workers and cfg.data.max_data_loader_n_workers == 0:
        yield "persistent_data_loader_workers has no effect: max_data_loader_n_workers is 0"


def _learning_rate(cfg: RunConfig) -> Iterator[str]:
    acting = {"lr_scheduler_num_cycles": "cosine_with_restarts", "lr_scheduler_power": "polynomial"}
    for name, scheduler in acting.items():
        if cfg.get(name) != 1 and cfg.optim.lr_scheduler != scheduler:
            yield f"{name} has no effect: it acts with lr_scheduler {scheduler}, not {cfg.optim.lr_scheduler}"
    arguments = cfg.optim.optimizer_kwargs()
    relative = arguments.get("relative_step", True) or arguments.get("warmup_init", False)
    if cfg.optim.optimizer_type == "Adafactor" and relative:
        for name in ("learning_rate", "unet_lr", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps"):
            if cfg.is_given(name):
                yield (
                    f"{name} has no effect: Adafactor sets its own rate; to set it, use optimizer_args "
                    '["relative_step=False", "scale_parameter=False", "warmup_init=False"]'
                )


def _network(cfg: RunConfig) -> Iterator[str]:
    network = cfg.network
    if network.dim_from_weights and cfg.is_given("network_dim"):
        yield "network_dim is ignored: dim_from_weights takes the ranks from network_weights"
    if network.network_train_unet_only and network.text_encoder_lr:
        yield "text_encoder_lr has no effect: network_train_unet_only leaves the text encoders as they are"
    if network.network_train_text_encoder_only and network.unet_lr is not None:
        yield "unet_lr has no effect: network_train_text_encoder_only leaves the U-Net as it is"


def _finetune(cfg: RunConfig) -> Iterator[str]:
    finetune, rate = cfg.finetune, cfg.optim.learning_rate
    for name in ("learning_rate_te1", "learning_rate_te2"):
        if cfg.get(name) and not finetune.train_text_encoder:
            yield f"{name} has no effect: set train_text_encoder to train the text encoders"
    if finetune.block_lr and not rate:
        yield "block_lr has no effect: learning_rate 0 leaves the whole U-Net as it is"


def _saving(cfg: RunConfig) -> Iterator[str]:
    save = cfg.save
    if save.save_n_epoch_ratio and save.save_every_n_epochs:
        yield "save_every_n_epochs is ignored: save_n_epoch_ratio takes its place"
    saves_epochs = bool(save.save_every_n_epochs or save.save_n_epoch_ratio)
    for name in ("save_last_n_epochs", "save_last_n_epochs_state"):
        if cfg.get(name) and not saves_epochs:
            yield f"{name} has no effect: save_every_n_epochs is not set"
    for name in ("save_last_n_steps", "save_last_n_steps_state"):
        if cfg.get(name) and not save.save_every_n_steps:
            yield f"{name} has no effect: save_every_n_steps is not set"
    thumbnail = save.metadata_thumbnail
    if thumbnail and not thumbnail.startswith("data:") and not Path(thumbnail).is_file():
        yield f"metadata_thumbnail is left out: there is no file {thumbnail}"


def _logging(cfg: RunConfig) -> Iterator[str]:
    for name in ("wandb_run_name", "wandb_api_key"):
        if cfg.get(name) and cfg.loop.log_with not in ("wandb", "all"):
            yield f"{name} has no effect: it acts with log_with wandb"


def _samples(cfg: RunConfig) -> Iterator[str]:
    preview = cfg.preview
    asked = preview.sample_every_n_steps or preview.sample_every_n_epochs or preview.sample_at_first
    if preview.sample_prompts and not asked:
        yield (
            "sample_prompts draws nothing by itself: set sample_every_n_steps, sample_every_n_epochs or "
            "sample_at_first, or make the file sample_now in output_dir while training"
        )


def _generation(cfg: RunConfig) -> Iterator[str]:
    if cfg.generate.prompt and cfg.generate.from_file:
        yield "prompt is ignored: the prompts come from from_file"
    if cfg.generate.sdpa and cfg.generate.xformers:
        yield "sdpa and xformers are both set: xformers is used"


_TRAINING: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    _model,
    _length,
    _learning_rate,
    _saving,
    _logging,
    _samples,
)

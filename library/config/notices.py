"""Sentences about settings that are legal but do less than they seem to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from library.config.fields import FULL, NETWORK, TRAINER
from library.config.regional_networks import num_regional
from library.config.run_config import RunConfig


def notices(cfg: RunConfig) -> list[str]:
    """What to tell the user about this run before it starts."""
    if "loop" not in cfg.groups:
        return list(_generation(cfg))
    found = list(_data(cfg))
    if cfg.run in TRAINER:
        found += [sentence for part in _TRAINING for sentence in part(cfg)]
    if cfg.run in NETWORK:
        found += [*_network(cfg), *_frozen(cfg)]
    if cfg.run in FULL:
        found += list(_finetune(cfg))
    return found


def _data(cfg: RunConfig) -> Iterator[str]:
    for name in ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir"):
        if cfg.data.dataset_config and cfg.flat().get(name):
            yield f"{name} is ignored: the data is named by dataset_config"
    are_pairs = "lllite" in cfg.groups and cfg.lllite.conditioning_data_dir
    are_folders = not cfg.data.dataset_config and not cfg.data.in_json and not are_pairs
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


def _diffusion(cfg: RunConfig) -> Iterator[str]:
    """Options that only act beside another one."""
    chosen = cfg.diffusion
    of_huber = dict.fromkeys(("huber_c", "huber_scale", "huber_schedule"), "loss_type huber or smooth_l1")
    of_bias = {f"timestep_bias_{name}": "timestep_bias_strategy" for name in ("multiplier", "portion", "begin", "end")}
    acting = {
        **(of_huber if chosen.loss_type in ("l1", "l2") else {}),
        **({} if chosen.timestep_bias_strategy != "none" else of_bias),
        **({} if chosen.noise_offset else {"noise_offset_random_strength": "noise_offset"}),
        **({} if chosen.multires_noise_iterations else {"multires_noise_discount": "multires_noise_iterations"}),
        **({} if chosen.ip_noise_gamma else {"ip_noise_gamma_random_strength": "ip_noise_gamma"}),
        **({} if chosen.p2_gamma else {"p2_k": "p2_gamma"}),
        **({} if chosen.dream_training else {"dream_detail_preservation": "dream_training"}),
    }
    if chosen.timestep_sampling != "logit_normal":
        acting |= dict.fromkeys(("logit_mean", "logit_std"), "timestep_sampling logit_normal")
    if chosen.timestep_bias_strategy == "range":
        acting["timestep_bias_portion"] = "timestep_bias_strategy earlier or later"
    elif chosen.timestep_bias_strategy != "none":
        acting |= dict.fromkeys(("timestep_bias_begin", "timestep_bias_end"), "timestep_bias_strategy range")
    if chosen.timestep_bias_strategy != "none" and chosen.timestep_bias_multiplier == 1:
        yield "timestep_bias_strategy has no effect: timestep_bias_multiplier is 1"
    for name, other in acting.items():
        if cfg.get(name) != type(chosen).options()[name].default:
            yield f"{name} has no effect: it acts with {other}"


_SCHEDULE = ("lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps")
# Options that act with some schedules only.
_ACTS_WITH = {
    "lr_scheduler_num_cycles": (
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": (
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
        "rex",
    ),
    "lr_decay_steps": ("warmup_stable_decay",),
}


def _learning_rate(cfg: RunConfig) -> Iterator[str]:
    optim = cfg.optim
    if optim.sets_rate:
        for name in ("learning_rate", "unet_lr", "text_encoder_lr", *_SCHEDULE, *_ACTS_WITH):
            if cfg.is_given(name) and (name, cfg.get(name)) != ("lr_scheduler", "adafactor"):
                yield (
                    f"{name} has no effect: Adafactor sets its own rate; to set it, use optimizer_args "
                    '["relative_step=False", "scale_parameter=False", "warmup_init=False"]'
                )
    elif optim.is_schedule_free:
        for name in (*_SCHEDULE, *_ACTS_WITH):
            if cfg.is_given(name) and (name, cfg.get(name)) != ("lr_scheduler", "constant"):
                warm = name == "lr_warmup_steps" and not optim.estimates_rate
                way = '; for a warm-up in steps, use optimizer_args ["warmup_steps=100"]' if warm else ""
                yield f"{name} has no effect: {optim.optimizer_type} takes the place of a schedule{way}"
    else:
        yield from _schedule(cfg)
    if optim.estimates_rate:
        yield from _estimated_rate(cfg)
    if optim.optimizer_type == "SGDNesterov8bit":
        yield "SGDNesterov8bit makes steps of plain momentum: bitsandbytes has no Nesterov steps in 8 bits"


def _schedule(cfg: RunConfig) -> Iterator[str]:
    named, by_class = cfg.optim.lr_scheduler, cfg.optim.lr_scheduler_type
    if by_class and cfg.is_given("lr_scheduler"):
        yield "lr_scheduler is ignored: lr_scheduler_type takes its place"
    defaults = type(cfg.optim).options()
    for name, schedules in _ACTS_WITH.items():
        if cfg.get(name) != defaults[name].default and (by_class or named not in schedules):
            yield f"{name} has no effect: it acts with lr_scheduler {', '.join(schedules)}, not {by_class or named}"
    if named == "warmup_stable_decay" and not by_class and not cfg.optim.lr_decay_steps:
        yield "lr_scheduler warmup_stable_decay never decays: lr_decay_steps is 0"


def _estimated_rate(cfg: RunConfig) -> Iterator[str]:
    """What the makers of D-Adaptation and Prodigy, and sd-scripts, warn of."""
    optim, name = cfg.optim, cfg.optim.optimizer_type
    given = [rate for rate in _rates(cfg) if rate]
    if given and max(given) <= 0.1:
        yield f"learning rate {max(given):g} is low for {name}, which finds its step size itself: 1.0 is usual"
    if optim.is_schedule_free:
        return
    if optim.lr_warmup_steps and name.endswith("Prodigy") and not optim.optimizer_kwargs().get("safeguard_warmup"):
        yield f'{name} may overestimate its step size in a warm-up: use optimizer_args ["safeguard_warmup=True"]'
    if optim.lr_scheduler == "cosine_with_restarts" and optim.lr_scheduler_num_cycles > 1:
        yield f"restarts are known to fail with {name}: use lr_scheduler constant or cosine"


def _rates(cfg: RunConfig) -> list[float]:
    """The learning rates that act."""
    if "network" not in cfg.groups:
        return [cfg.optim.learning_rate]
    network, default = cfg.network, cfg.optim.learning_rate
    rates: list[float] = []
    if not network.network_train_text_encoder_only:
        rates.append(default if network.unet_lr is None else network.unet_lr)
    if not network.network_train_unet_only:
        rates += network.text_encoder_lr or (default,)
    return rates


def _network(cfg: RunConfig) -> Iterator[str]:
    network = cfg.network
    if network.dim_from_weights and cfg.is_given("network_dim"):
        yield "network_dim is ignored: dim_from_weights takes the ranks from network_weights"
    if (network.network_module or "").removeprefix("networks.") == "oft":
        if network.text_encoder_lr:
            yield "text_encoder_lr has no effect: networks.oft adapts the U-Net only"
    elif network.network_train_unet_only and network.text_encoder_lr:
        yield "text_encoder_lr has no effect: network_train_unet_only leaves the text encoders as they are"
    if network.network_train_text_encoder_only and network.unet_lr is not None:
        yield "unet_lr has no effect: network_train_text_encoder_only leaves the U-Net as it is"


def _precision(cfg: RunConfig) -> Iterator[str]:
    precision = cfg.precision
    if cfg.is_given("stochastic_rounding") and not precision.full_bf16:
        yield "stochastic_rounding has no effect: it acts with full_bf16"
    if precision.fused_backward_pass and precision.fused_optimizer_groups:
        yield "fused_optimizer_groups is ignored: fused_backward_pass takes its place"


def _frozen(cfg: RunConfig) -> Iterator[str]:
    if cfg.frozen.fp8_base and cfg.frozen.fp8_base_unet:
        yield "fp8_base acts on the U-Net only, as fp8_base_unet says"


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


def _averages(cfg: RunConfig) -> Iterator[str]:
    for name in ("ema_inv_gamma", "ema_power"):
        if cfg.ema.use_ema and cfg.is_given(name) and not cfg.ema.ema_warmup:
            yield f"{name} has no effect: it acts with ema_warmup"
    if cfg.ema.use_ema and "schedulefree" in cfg.optim.optimizer_type.lower():
        yield (
            f"use_ema averages the points at which {cfg.optim.optimizer_type} trains; the optimizer keeps an average "
            "of its own, which is what is saved and shown without use_ema"
        )
    is_seen = cfg.preview.sample_with_ema or cfg.validation.validate_with_ema
    if cfg.ema.use_ema and cfg.ema.save_ema == "none" and not is_seen:
        yield "use_ema has no effect on any file but saved states: set save_ema, sample_with_ema or validate_with_ema"


def _generation(cfg: RunConfig) -> Iterator[str]:
    source = next((name for name in ("from_file", "from_module") if cfg.get(name)), "")
    if cfg.generate.prompt and source:
        yield f"prompt is ignored: the prompts come from {source}"
    if cfg.prompter.from_module and source != "from_module":
        yield f"from_module is ignored: the prompts come from {source}"
    if cfg.generate.scale <= 1:
        for name in ("negative_scale", "guidance_rescale", "original_width_negative", "original_height_negative"):
            if cfg.get(name):
                yield f"{name} has no effect on prompts without guidance: scale is {cfg.generate.scale:g}, not above 1"
    if cfg.pictures.image_quality is not None and cfg.pictures.image_format == "png":
        yield "image_quality has no effect on PNG files, only on names in prompts that end in .webp, .jpg or .jpeg"
    if cfg.pictures.prompts_per_rank and int(os.environ.get("WORLD_SIZE") or 1) < 2:
        yield "prompts_per_rank has no effect on one process: start it with accelerate launch or torchrun"
    if cfg.img2img.image_path and num_regional(cfg):
        yield "mask_path says where networks act, so the whole of image_path is drawn anew"
    if cfg.generate.sdpa and cfg.generate.xformers:
        yield "sdpa and xformers are both set: xformers is used"


_TRAINING: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    _model,
    _length,
    _diffusion,
    _learning_rate,
    _precision,
    _saving,
    _logging,
    _samples,
    _averages,
)

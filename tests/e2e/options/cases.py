"""One case for each option: a value, what it needs beside it, and where its effect shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.e2e.options.observing import Look, Seen, files, headers, lines, numbers

TOKENS, LLLITE = "sdxl_train_textual_inversion", "sdxl_train_control_net_lllite"


LEVELS = ("batches", "rehearsal", "whole")


@dataclass(frozen=True)
class Case:
    """`value` is set on top of `beside`; `look` at the two runs must differ. A text value may name {folder}.

    Cases with the same `together` are set in one run, since each looks at something of its own. `level`: the
    least of a run that shows it; more of it is tried where that does not.
    """

    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)
    look: Look = numbers
    together: str = ""
    level: str = "rehearsal"


def header(name: str) -> Look:
    """What the headers of the written files say under one modelspec name."""
    return lambda seen: [found.get(f"modelspec.{name}") for found in seen.headers.values()]


def _bucketed(**more: Any) -> dict[str, Any]:
    return {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 32, **more}


TEXTS = {"cache_text_encoder_outputs": True, "network_train_unet_only": True}
LATENTS = {"cache_latents": True}
ON_DISK = {"cache_latents": True, "cache_latents_to_disk": True}
SAMPLES = {"sample_prompts": "{folder}/prompts.txt"}
HALF = {"mixed_precision": "bf16"}

MODEL: dict[str, Case] = {
    "pretrained_model_name_or_path": Case("{folder}/other.safetensors"),
    "vae": Case("{folder}/vae.safetensors"),
    "max_token_length": Case(150, {"caption_prefix": "word, " * 60}, level="batches"),
    "weighted_captions": Case(True, level="batches"),
    "clip_skip": Case(2, look=headers),
    "no_half_vae": Case(True, HALF),
    "vae_batch_size": Case(2, LATENTS, look=lambda seen: seen.vae_batches),
    "vae_slicing": Case(True, look=lambda seen: seen.facts["use_slicing"]),
    "vae_tiling": Case(True, look=lambda seen: seen.facts["use_tiling"]),
    "disable_mmap_load_safetensors": Case(True, look=lambda seen: seen.loading["disable_mmap"]),
    "xformers": Case(True),
    "mem_eff_attn": Case(True, look=lines),
}
DATA: dict[str, Case] = {
    "dataset_config": Case("{folder}/data.toml", {"train_data_dir": None}),
    "train_data_dir": Case("{folder}/regularisation"),
    "reg_data_dir": Case("{folder}/regularisation"),
    "in_json": Case("{folder}/meta.json", {"train_data_dir": "{folder}/images/1_thing"}),
    "prior_loss_weight": Case(0.25, {"reg_data_dir": "{folder}/regularisation"}),
    "resolution": Case(96),
    "resolutions": Case([64, 96], {"resolution": None}),
    "resolution_weights": Case([1.0, 9.0], {"resolution": None, "resolutions": [64, 96], "max_train_steps": 4}),
    "enable_bucket": Case(True, _bucketed(enable_bucket=False)),
    "min_bucket_reso": Case(64, _bucketed()),
    "max_bucket_reso": Case(64, _bucketed()),
    "bucket_reso_steps": Case(64, _bucketed()),
    "bucket_no_upscale": Case(True, _bucketed(resolution=128, max_bucket_reso=192)),
    "bucket_selection": Case("area", _bucketed(resolution=80, bucket_no_upscale=True)),
    "bucket_max_crop": Case(0.01, _bucketed(), look=lines),
    "bucket_max_upscale": Case(1.1, _bucketed(resolution=128, max_bucket_reso=192), look=lines),
    "caption_extension": Case(".words"),
    "caption_separator": Case(";", {"shuffle_caption": True}),
    "shuffle_caption": Case(True),
    "keep_tokens": Case(2, {"shuffle_caption": True}),
    "keep_tokens_separator": Case(";;", {"shuffle_caption": True}),
    "secondary_separator": Case(";;"),
    "enable_wildcard": Case(True),
    "caption_prefix": Case("a photo of"),
    "caption_suffix": Case("in oil"),
    "caption_dropout_rate": Case(0.9),
    "caption_dropout_every_n_epochs": Case(1),
    "caption_tag_dropout_rate": Case(0.9),
    "token_warmup_min": Case(3, {"token_warmup_step": 2.0}),
    "token_warmup_step": Case(2.0),
    "flip_aug": Case(True),
    "color_aug": Case(True, {"max_train_steps": 6}),
    "random_crop": Case(True),
    "face_crop_aug_range": Case("1.5,2.5"),
    "resize_interpolation": Case("nearest"),
    "alpha_mask": Case(True),
    "masked_loss": Case(True, {"dataset_config": "{folder}/masks.toml", "train_data_dir": None}),
    "masked_loss_normalize": Case("area", {"alpha_mask": True}),
    "validation_split": Case(0.5),
    "validation_seed": Case(5, {"validation_split": 0.5}),
    "dataset_repeats": Case(3, {"in_json": "{folder}/meta.json", "train_data_dir": "{folder}/images/1_thing"}, lines),
    "train_batch_size": Case(1),
    "cache_latents": Case(True, look=lambda seen: seen.vae_batches),
    "cache_latents_to_disk": Case(True, {"cache_dir": "{folder}/{out}/cache"}, files),
    "cache_latents_moments": Case(True, {**LATENTS, "max_train_steps": 4}),
    "cache_in_background": Case(True, LATENTS, lines),
    "cache_text_encoder_outputs": Case(True, {"network_train_unet_only": True}, lambda seen: seen.text_batches),
    "cache_text_encoder_outputs_to_disk": Case(
        True, {"network_train_unet_only": True, "cache_dir": "{folder}/{out}/cache"}, files
    ),
    "cache_store": Case("packed", {**ON_DISK, "cache_dir": "{folder}/{out}/cache"}, files),
    "cache_dir": Case("{folder}/{out}/cache", ON_DISK, files),
    "text_cache_variants": Case(
        3, {**TEXTS, "shuffle_caption": True, "text_cache_variants": 2}, lambda seen: sum(seen.text_batches)
    ),
    "text_encoder_batch_size": Case(3, TEXTS, lambda seen: seen.text_batches),
    "skip_cache_check": Case(
        True, {**ON_DISK, "vae": "{folder}/vae.safetensors", "cache_dir": "{folder}/{run}/cache"}, lines
    ),
    "legacy_crop_conditioning": Case(True),
    "max_data_loader_n_workers": Case(1, look=lambda seen: seen.loader.get("num_workers", 0)),
    "persistent_data_loader_workers": Case(
        True, {"max_data_loader_n_workers": 1}, lambda seen: seen.loader["persistent_workers"]
    ),
}
_NEED_CACHES = {"cache_latents_moments", "cache_in_background", "skip_cache_check", "masked_loss_normalize"}
DATA |= {
    name: replace(case, level="batches")
    for name, case in DATA.items()
    if case.look in (numbers, lines) and name not in _NEED_CACHES
}
LOOP: dict[str, Case] = {
    "min_timestep": Case(900),
    "max_timestep": Case(10),
    "max_train_steps": Case(2),
    "max_train_epochs": Case(1, look=lambda seen: len(seen.steps)),
    "gradient_accumulation_steps": Case(2, level="batches"),
    "gradient_checkpointing": Case(True, look=lambda seen: seen.facts["gradient_checkpointing"]),
    "mixed_precision": Case("bf16"),
    "seed": Case(4),
    "resume": Case("{folder}/{run}/net-state", {"max_train_steps": 2}, lambda seen: len(seen.steps)),
    "logging_dir": Case("{folder}/{out}/tracks", look=lambda seen: seen.trackers),
    "log_prefix": Case("mine-", {"logging_dir": "{folder}/{out}/tracks"}, lambda seen: seen.trackers),
}
OPTIMIZER: dict[str, Case] = {
    "optimizer_type": Case("torch.optim.SGD"),
    "optimizer_args": Case(["weight_decay=0.5"]),
    "use_8bit_adam": Case(True),
    "learning_rate": Case(1e-2),
    "lr_scheduler": Case("cosine", {"max_train_steps": 2}),
    "lr_scheduler_args": Case(['step_rules="1:1,0.1"'], {"lr_scheduler": "piecewise_constant", "max_train_steps": 2}),
    "lr_scheduler_num_cycles": Case(2, {"lr_scheduler": "cosine_with_restarts", "max_train_steps": 4}),
    "lr_scheduler_power": Case(3.0, {"lr_scheduler": "polynomial", "max_train_steps": 2}),
    "lr_warmup_steps": Case(2, {"lr_scheduler": "constant_with_warmup", "max_train_steps": 2}),
    "max_grad_norm": Case(1e-3),
}
SAVING: dict[str, Case] = {
    "output_name": Case("other", look=files),
    "save_precision": Case("fp16"),
    "save_model_as": Case("diffusers", look=files),
    "save_every_n_epochs": Case(1, {"max_train_epochs": 2, "train_batch_size": 4}, files),
    "save_every_n_steps": Case(1, {"max_train_steps": 2}, files),
    "save_n_epoch_ratio": Case(2, {"max_train_epochs": 2, "train_batch_size": 4}, files),
    "save_last_n_epochs": Case(1, {"max_train_epochs": 3, "train_batch_size": 4, "save_every_n_epochs": 1}, files),
    "save_last_n_epochs_state": Case(
        1, {"max_train_epochs": 3, "train_batch_size": 4, "save_every_n_epochs": 1, "save_state": True}, files
    ),
    "save_last_n_steps": Case(1, {"max_train_steps": 4, "save_every_n_steps": 1}, files),
    "save_last_n_steps_state": Case(1, {"max_train_steps": 4, "save_every_n_steps": 1, "save_state": True}, files),
    "save_state": Case(True, look=files),
    "save_state_on_train_end": Case(True, look=files),
    **{
        f"metadata_{name}": Case("words", look=header(name), together="metadata")
        for name in (
            "author", "description", "license", "tags", "usage_hint", "merged_from", "trigger_phrase", "preprocessor",
            "is_negative_embedding",
        )
    },
    "metadata_title": Case("words", look=lambda seen: seen.titles, together="metadata"),
    "metadata_thumbnail": Case("data:image/png;base64,AAAA", look=header("thumbnail"), together="metadata"),
}  # fmt: skip
PICTURES: dict[str, Case] = {
    "sample_prompts": Case("{folder}/prompts.txt", {"sample_at_first": True}, files),
    "sample_every_n_steps": Case(1, SAMPLES, files),
    "sample_every_n_epochs": Case(1, {**SAMPLES, "train_batch_size": 4}, files),
    "sample_at_first": Case(True, SAMPLES, files),
    "sample_sampler": Case("ddim", {**SAMPLES, "sample_at_first": True}, lambda seen: seen.pictures),
}
NETWORKS: dict[str, Case] = {
    "network_module": Case("networks.lora_fa"),
    "network_dim": Case(4),
    "network_alpha": Case(4.0),
    "network_dropout": Case(0.5, {"max_train_steps": 4}),
    "network_args": Case(["conv_dim=2"]),
    "network_weights": Case("{folder}/{run}/net.safetensors"),
    "dim_from_weights": Case(True, {"network_weights": "{folder}/{run}/net.safetensors", "network_dim": 4}),
    "scale_weight_norms": Case(1e-3),
    "base_weights": Case(["{folder}/{run}/net.safetensors"]),
    "base_weights_multiplier": Case([9.0], {"base_weights": ["{folder}/{run}/net.safetensors"]}),
    "network_train_unet_only": Case(True),
    "network_train_text_encoder_only": Case(True),
    "unet_lr": Case(1e-2),
    "text_encoder_lr": Case([1e-2]),
    "training_comment": Case("words", look=headers),
    "no_metadata": Case(True, look=headers),
}
BLOCKS = [0.0] * 22 + [1e-3]
FINE_TUNE: dict[str, Case] = {
    "train_text_encoder": Case(True),
    "learning_rate_te1": Case(1e-2, {"train_text_encoder": True}),
    "learning_rate_te2": Case(1e-2, {"train_text_encoder": True}),
    "block_lr": Case(BLOCKS),
    "unet_config": Case("{folder}/unet.json"),
}
CHANGED = {"allow_prediction_type_change": True}
VELOCITY = {**CHANGED, "prediction_type": "v_prediction"}
PREDICTION: dict[str, Case] = {
    "prediction_type": Case("v_prediction", CHANGED),
    "v_parameterization": Case(True, CHANGED),
    "allow_prediction_type_change": Case(True, {"prediction_type": "v_prediction"}),
    "zero_terminal_snr": Case(True, VELOCITY),
    "flow_shift": Case(3.0, {**CHANGED, "prediction_type": "rectified_flow"}),
}
LATER = {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 1000.0}
RANGE = {**LATER, "timestep_bias_strategy": "range", "timestep_bias_begin": 100, "timestep_bias_end": 200}
DIFFUSION: dict[str, Case] = {
    "loss_type": Case("l1"),
    "timestep_sampling": Case("logit_normal"),
    "logit_mean": Case(2.0, {"timestep_sampling": "logit_normal"}),
    "logit_std": Case(0.1, {"timestep_sampling": "logit_normal"}),
    "timestep_sequence": Case("sobol"),
    "timestep_bias_strategy": Case("later", {"timestep_bias_multiplier": 1000.0}),
    "timestep_bias_multiplier": Case(2.0, LATER),
    "timestep_bias_begin": Case(10, RANGE),
    "timestep_bias_end": Case(900, RANGE),
    "timestep_bias_portion": Case(0.9, LATER),
    "noise_offset": Case(0.3),
    "noise_offset_random_strength": Case(True, {"noise_offset": 0.3}),
    "adaptive_noise_scale": Case(1.0, {"noise_offset": 0.3}),
    "multires_noise_iterations": Case(4),
    "multires_noise_discount": Case(0.9, {"multires_noise_iterations": 4}),
    "ip_noise_gamma": Case(0.3),
    "ip_noise_gamma_random_strength": Case(True, {"ip_noise_gamma": 0.3}),
    "huber_c": Case(0.9, {"loss_type": "huber"}),
    "huber_scale": Case(9.0, {"loss_type": "huber"}),
    "huber_schedule": Case("constant", {"loss_type": "smooth_l1"}),
    "min_snr_gamma": Case(0.1),
    "soft_min_snr_gamma": Case(1.0),
    "p2_gamma": Case(1.0),
    "p2_k": Case(9.0, {"p2_gamma": 1.0}),
    "scale_v_pred_loss_like_noise_pred": Case(True, VELOCITY),
    "v_pred_like_loss": Case(0.5),
    "debiased_estimation_loss": Case(True),
    "dream_training": Case(True),
    "dream_detail_preservation": Case(9.0, {"dream_training": True}),
}
UPDATES: dict[str, Case] = {
    "use_lion_optimizer": Case(True),
    "lr_scheduler_type": Case("StepLR", {"lr_scheduler_args": ["step_size=1"], "max_train_steps": 2}),
    "lr_scheduler_timescale": Case(3, {"lr_scheduler": "inverse_sqrt", "max_train_steps": 4}),
    "lr_scheduler_min_lr_ratio": Case(0.5, {"lr_scheduler": "cosine_with_min_lr", "max_train_steps": 2}),
    "lr_decay_steps": Case(2, {"lr_scheduler": "warmup_stable_decay", "max_train_steps": 3}),
    "full_bf16": Case(True, HALF),
    "full_fp16": Case(True),  # refused here: it needs a GPU
    "stochastic_rounding": Case(False, {**HALF, "full_bf16": True}),
    "fused_backward_pass": Case(True, {"max_grad_norm": 0.0}, lambda seen: seen.facts["update"]),
    "fused_optimizer_groups": Case(2, {"max_grad_norm": 0.0}, lambda seen: seen.facts["update"]),
    "fp8_base": Case(True, HALF),
    "fp8_base_unet": Case(True, HALF),
}
HELD_OUT = {"validation_split": 0.5, "train_batch_size": 1, "max_train_steps": 3, "validation_timesteps": 1}
AVERAGED = {"use_ema": True, "ema_decay": 0.9, "max_train_steps": 2}
EVALUATION: dict[str, Case] = {
    "sample_grid": Case(True, {**SAMPLES, "sample_at_first": True}, files),
    "sample_with_ema": Case(True, {**SAMPLES, **AVERAGED, "sample_every_n_steps": 2}, lambda seen: seen.pictures),
    "validate_every_n_steps": Case(1, HELD_OUT),
    "validate_every_n_epochs": Case(2, HELD_OUT),
    "validate_at_first": Case(True, HELD_OUT),
    "max_validation_steps": Case(1, HELD_OUT),
    "validation_timesteps": Case(2, HELD_OUT),
    "validate_with_ema": Case(True, {**HELD_OUT, **AVERAGED}),
    "use_ema": Case(True, look=files),
    "ema_decay": Case(0.1, AVERAGED),
    "ema_min_decay": Case(0.99, {"use_ema": True, "max_train_steps": 2}),
    "ema_warmup": Case(True, AVERAGED),
    "ema_inv_gamma": Case(0.1, {**AVERAGED, "ema_warmup": True}),
    "ema_power": Case(0.1, {**AVERAGED, "ema_warmup": True}),
    "ema_update_after_step": Case(1, AVERAGED),
    "ema_update_interval": Case(2, AVERAGED),
    "save_ema": Case("only", AVERAGED, files),
}
BESIDE_NETWORK = {"train_tokens": True, "token_string": "zxq"}
NEW_TOKENS: dict[str, Case] = {
    "token_string": Case("zxq", {"train_tokens": True}, files),
    "num_vectors_per_token": Case(3, BESIDE_NETWORK),
    "init_word": Case("blue", BESIDE_NETWORK),
    "weights": Case("{folder}/word.safetensors", BESIDE_NETWORK),
    "token_file": Case(
        "{folder}/tokens.toml", {"train_tokens": True, "token_string": None, "num_vectors_per_token": None}
    ),
    "use_object_template": Case(True, BESIDE_NETWORK, level="batches"),
    "use_style_template": Case(True, BESIDE_NETWORK, level="batches"),
    "token_template_file": Case("{folder}/sentences.txt", BESIDE_NETWORK, level="batches"),
    "token_norm_decay": Case(0.5, BESIDE_NETWORK),
    "train_tokens": Case(True, {"token_string": "zxq"}, files),
    "token_lr": Case(1e-2, BESIDE_NETWORK),
    "bundle_tokens": Case(True, BESIDE_NETWORK),
}
CONDITIONS: dict[str, Case] = {
    "conditioning_data_dir": Case("{folder}/others", level="batches"),
    "cond_emb_dim": Case(6),
}
CASES = {
    **NEW_TOKENS, **CONDITIONS, **MODEL, **DATA, **LOOP, **OPTIMIZER, **SAVING, **PICTURES, **NETWORKS,
    **FINE_TUNE, **PREDICTION, **DIFFUSION, **UPDATES, **EVALUATION, "log_with": Case("wandb"),
}  # fmt: skip

# What a mode needs otherwise: pictures with conditions, captions with the token.
NO_FOLDERS = {"train_data_dir": None, "conditioning_data_dir": None}
IN_MODE: dict[str, dict[str, Case]] = {
    TOKENS: {
        "train_data_dir": Case("{folder}/more", level="batches"),
        "token_string": Case("circle"),
        "text_cache_variants": Case(3),
        "text_encoder_batch_size": Case(3),
    },
    LLLITE: {
        "train_data_dir": Case("{folder}/others", level="batches"),
        "network_dim": Case(6),
        "dataset_config": Case("{folder}/masks.toml", NO_FOLDERS, level="batches"),
        "prior_loss_weight": Case(0.25, {**NO_FOLDERS, "dataset_config": "{folder}/reg.toml"}, level="batches"),
    },
}


# What is refused: where the computer lacks something, and in a mode that has no place for it. Nothing else may be, or a
# case whose value does not fit the mode would pass.
REFUSED = {"xformers", "full_fp16", "log_with"}
REFUSED_IN = {
    "sdxl_train_network": {"save_model_as"},
    TOKENS: {
        "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_cache_variants",
        "text_encoder_batch_size", "save_model_as",
    },
    LLLITE: {"reg_data_dir", "masked_loss", "save_model_as"},
}  # fmt: skip


def may_be_refused(run: str, name: str) -> bool:
    """Whether a training mode may refuse an option, whatever its value."""
    return name in REFUSED | REFUSED_IN.get(run, set())


def cases_of(run: str) -> dict[str, Case]:
    """The cases by option, as they are in a training mode."""
    return {**CASES, **IN_MODE.get(run, {})}


def filled(value: Any, *, folder: Path, run: str, out: str) -> Any:
    """`value` with its {folder}, {run} and {out} replaced."""
    if isinstance(value, list):
        return [filled(item, folder=folder, run=run, out=out) for item in value]
    if isinstance(value, str) and "{" in value:
        return value.replace("{folder}", str(folder)).replace("{run}", f"first-{run}").replace("{out}", out)
    return value


__all__ = ["CASES", "Case", "Seen", "cases_of", "filled", "may_be_refused"]

"""Rules about the data."""

from __future__ import annotations

from library.config.fields import ADMIN, LATENTS, NETWORK, REPORT, SHARED, TRAINER
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("train_data_dir", "in_json", "dataset_config", runs=SHARED | ADMIN | REPORT)
def data_is_named(cfg: RunConfig) -> list[Problem]:
    """A run needs images."""
    if cfg.data.train_data_dir or cfg.data.in_json or cfg.data.dataset_config:
        return []
    return [Problem("there is no data", fix="set train_data_dir, in_json or dataset_config")]


@rule("in_json", "reg_data_dir", "dataset_config", runs=SHARED | ADMIN | REPORT)
def metadata_has_no_regularisation(cfg: RunConfig) -> list[Problem]:
    """Regularisation images come with folders, not with a metadata file."""
    if not (cfg.data.in_json and cfg.data.reg_data_dir) or cfg.data.dataset_config:
        return []
    return conflict(
        cfg,
        "in_json and reg_data_dir cannot be used together",
        "in_json",
        "reg_data_dir",
        fix="describe both in a dataset_config: one dataset with metadata_file, one of folders with is_reg",
    )


@rule("cache_latents", "cache_latents_moments", "cache_in_background", runs=TRAINER | LATENTS)
def latents_are_cached(cfg: RunConfig) -> list[Problem]:
    """What is said about the cache of latents needs one."""
    names = [name for name in ("cache_latents_moments", "cache_in_background") if cfg.get(name)]
    if cfg.data.cache_latents or not names:
        return []
    what = f"{' and '.join(names)} need{'s' if len(names) == 1 else ''} cache_latents"
    return conflict(cfg, what, *names, fix="add cache_latents, or cache_latents_to_disk")


@rule("cache_text_encoder_outputs", "network_train_unet_only", runs=NETWORK)
def cached_text_is_not_trained(cfg: RunConfig) -> list[Problem]:
    """Text encoders whose outputs are cached cannot be trained."""
    if not cfg.data.cache_text_encoder_outputs or cfg.network.network_train_unet_only:
        return []
    return conflict(
        cfg,
        "cache_text_encoder_outputs needs network_train_unet_only: cached text encoders cannot be trained",
        "cache_text_encoder_outputs",
        fix="set network_train_unet_only, or leave the cache out",
    )


@rule("cache_store", "cache_latents_to_disk", "cache_text_encoder_outputs_to_disk")
def caches_are_on_disk(cfg: RunConfig) -> list[Problem]:
    """How caches are kept on disk matters when there is one."""
    if cfg.data.cache_store == "npz" or cfg.data.cache_latents_to_disk or cfg.data.cache_text_encoder_outputs_to_disk:
        return []
    return conflict(
        cfg,
        "cache_store cannot act: nothing is cached on disk",
        "cache_store",
        fix="set cache_latents_to_disk or cache_text_encoder_outputs_to_disk",
    )


@rule("text_cache_variants", "cache_text_encoder_outputs")
def variants_are_cached(cfg: RunConfig) -> list[Problem]:
    """Variants are what a text cache keeps; without one every visit has a wording of its own."""
    if cfg.data.text_cache_variants == 1 or cfg.data.cache_text_encoder_outputs:
        return []
    return conflict(
        cfg,
        "text_cache_variants acts with cache_text_encoder_outputs only: without it every wording is encoded anew",
        "text_cache_variants",
        fix="set cache_text_encoder_outputs, or leave text_cache_variants out",
    )

"""The two cache tools: from the settings to filled cache files, on one or several processes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState

from library.config.dataset_file import dataset_specs
from library.config.run_config import RunConfig
from library.data.cache_places import index_folder
from library.data.caching import CacheReport
from library.data.dataset import TrainData, build_train_data
from library.inference import encode_pass
from library.log import get_logger
from library.models import checkpoint, memory
from library.models.families import sdxl
from library.models.tokenizers import load_tokenizer

log = get_logger(__name__)

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cache_latents(cfg: RunConfig) -> CacheReport:
    """Write the latents of every image of the data set beside it; what is there and still right stays."""
    state = PartialState(cpu=not torch.cuda.is_available())
    report = fill_latents(cfg, _data(cfg), state)
    state.destroy_process_group()
    return report


def fill_latents(cfg: RunConfig, data: TrainData, state: PartialState) -> CacheReport:
    """Write the latents of `data` that are not there yet, this process's share; what cannot be encoded is dropped."""
    dtype = _DTYPES[cfg.loop.mixed_precision]
    bundle = checkpoint.load_bundle(
        cfg.model.pretrained_model_name_or_path,
        vae=cfg.model.vae,
        dtype=torch.float32 if cfg.model.no_half_vae else dtype,
        parts=("vae",),
        disable_mmap=cfg.model.disable_mmap_load_safetensors,
    )
    memory.configure_vae(bundle.vae, slicing=cfg.model.vae_slicing, tiling=cfg.model.vae_tiling)
    _, report = encode_pass.cache_latents_pass(
        bundle, data, cfg=cfg, device=state.device, rank=state.process_index, world=state.num_processes
    )
    _tell(report, "latents")
    return report


def cache_text_encoder_outputs(cfg: RunConfig) -> CacheReport:
    """Write the encoded caption of every image of the data set beside it; what is there and still right stays."""
    state = PartialState(cpu=not torch.cuda.is_available())
    data = _data(
        cfg,
        rank=state.process_index,
        count_tokens=partial(sdxl.count_tokens, load_tokenizer(), weighted=cfg.model.weighted_captions),
        max_token_length=cfg.model.max_token_length,
    )
    bundle = checkpoint.load_bundle(
        cfg.model.pretrained_model_name_or_path,
        dtype=_DTYPES[cfg.loop.mixed_precision],
        parts=("text_encoders",),
        disable_mmap=cfg.model.disable_mmap_load_safetensors,
    )
    _, report = encode_pass.cache_text_pass(
        bundle, data, cfg=cfg, device=state.device, rank=state.process_index, world=state.num_processes
    )
    _tell(report, "text encoder outputs")
    state.destroy_process_group()
    return report


def _data(cfg: RunConfig, **settings: Any) -> TrainData:
    for notice in cfg.notices:
        log.info(notice)
    # Every image is cached as if it were trained on: a run with another seed holds out others.
    specs = [replace(spec, validation_split=0.0) for spec in dataset_specs(cfg)]
    data = build_train_data(specs, seed=cfg.loop.seed or 0, cache_dir=index_folder(cfg), **settings)
    log.info(data.summary().text())
    return data


def _tell(report: CacheReport, what: str) -> None:
    if report.stale or report.failed:
        log.info(report.text(what))

"""From settings to what is trained on: data, base model and caches, checked in the order of what costs least."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from library.config.dataset_file import dataset_specs
from library.data.cache_places import index_folder
from library.data.dataset import build_train_data
from library.inference import encode_pass
from library.inference import launch as inference
from library.inference.texts import TextForm
from library.log import get_logger
from library.models import arch, attention, checkpoint, memory
from library.models.families import sdxl
from library.models.tokenizers import load_tokenizer
from library.training import early, prediction
from library.training.precision import trained_dtype, weight_dtype
from library.training.run import Run
from library.training.trainable import PART_MODULES, Trainable

if TYPE_CHECKING:
    from library.config.cli import RunConfig

log = get_logger(__name__)


def prepare(cfg: RunConfig, trainable: Trainable, accelerator: Accelerator) -> Run:
    """Data, previews and base model, checked in the order of what costs least; caches are built."""
    seed = early.agreed_seed(cfg, accelerator)
    early.check_base(cfg, trainable)
    tokens = getattr(trainable, "tokens", None)
    specs = dataset_specs(cfg) if tokens is None else tokens.fit_data(dataset_specs(cfg))
    previews = early.preview_requests(cfg, specs[0].resolution, prediction.early_decision(cfg))
    tokenizer = load_tokenizer() if tokens is None else tokens.tokenizer()
    max_token_length, weighted = cfg.model.max_token_length, cfg.model.weighted_captions
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
    if tokens is not None:
        tokens.check_data(data)
    dtype = weight_dtype(cfg.loop.mixed_precision)
    # One process of a machine reads the file first: the others then find it in the page cache.
    with accelerator.local_main_process_first():
        bundle = checkpoint.load_bundle(
            cfg.model.pretrained_model_name_or_path,
            vae=cfg.model.vae,
            dtype=dtype,
            dtypes=_part_dtypes(cfg, trainable),
            parts=trainable.loads,
            disable_mmap=cfg.model.disable_mmap_load_safetensors,
        )
    trainable.prepare(bundle, seed=seed)
    prediction.settle(cfg, bundle)
    memory.configure_vae(bundle.vae, slicing=cfg.model.vae_slicing, tiling=cfg.model.vae_tiling)
    attention.configure(bundle.unet, xformers=cfg.model.xformers, device=accelerator.device)
    run = Run(cfg, accelerator, trainable, seed, data, bundle, previews=previews)
    _fill_caches(run)
    return run


def _part_dtypes(cfg: RunConfig, trainable: Trainable) -> dict[arch.Part, torch.dtype]:
    """The parts that do not have the dtype of frozen weights: what trains, and a VAE that must not be halved."""
    dtypes: dict[arch.Part, torch.dtype] = {PART_MODULES[part]: trained_dtype(cfg) for part in trainable.owns}
    return dtypes | ({"vae": torch.float32} if cfg.model.no_half_vae else {})


def text_form(cfg: RunConfig) -> TextForm:
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
            bundle, run.previews, device=accelerator.device, text_form=text_form(cfg)
        )
    if run.text_cached:
        for encoder in (bundle.text_encoder_1, bundle.text_encoder_2):
            encoder.to("cpu")

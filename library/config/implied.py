"""Settings that follow from other settings, each with the sentence that tells the user so."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from glob import glob
from typing import Any, NamedTuple

from library.config.command_line import COMMAND_LINE
from library.config.fields import TOKENS
from library.config.run_config import RunConfig


class Implied(NamedTuple):
    """A setting to change: where the new value comes from, and what to tell the user ("" for nothing)."""

    name: str
    value: Any
    because: str
    notice: str = ""


def apply_implied(cfg: RunConfig) -> RunConfig:
    """The configuration with everything that follows from it; the rules run in order, each sees the ones before."""
    for rule in _RULES:
        for implied in rule(cfg):
            cfg = _with(cfg, implied)
    return cfg


def _with(cfg: RunConfig, implied: Implied) -> RunConfig:
    groups = dict(cfg.groups)
    key = next(key for key, group in groups.items() if implied.name in type(group).options())
    groups[key] = groups[key].model_copy(update={implied.name: implied.value})
    provenance = {**cfg.provenance, implied.name: implied.because}
    notices = [*cfg.notices, implied.notice] if implied.notice else list(cfg.notices)
    return RunConfig(cfg.run, groups=groups, provenance=provenance, notices=notices)


def _cache_tools(cfg: RunConfig) -> Iterator[Implied]:
    names = {
        "cache_latents": ("cache_latents", "cache_latents_to_disk"),
        "cache_text_encoder_outputs": ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
    }
    for name in names.get(cfg.run, ()):
        if not cfg.get(name):
            yield Implied(name, True, "what this tool does")


def _disk_caches(cfg: RunConfig) -> Iterator[Implied]:
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        if "data" in cfg.groups and cfg.get(f"{name}_to_disk") and not cfg.get(name):
            because = f"implied by {name}_to_disk"
            yield Implied(name, True, because, f"{name} is on, as {name}_to_disk asks for it")


def _older_optimizer_names(cfg: RunConfig) -> Iterator[Implied]:
    for name, optimizer in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if "optim" in cfg.groups and cfg.get(name) and not cfg.is_given("optimizer_type"):
            yield Implied("optimizer_type", optimizer, f"implied by {name}")


def _attention(cfg: RunConfig) -> Iterator[Implied]:
    if "model" in cfg.groups and cfg.model.mem_eff_attn and not cfg.model.sdpa:
        yield Implied("sdpa", True, "implied by mem_eff_attn", "mem_eff_attn: sdpa is used, which has taken its place")


def _resolutions(cfg: RunConfig) -> Iterator[Implied]:
    """Of the two spellings, the one on the command line beats the one in a file."""
    if "data" not in cfg.groups or not (cfg.is_given("resolution") and cfg.is_given("resolutions")):
        return
    first, second = cfg.provenance["resolution"], cfg.provenance["resolutions"]
    because = "the command line beats the file"
    if second == COMMAND_LINE != first:
        yield Implied("resolution", None, because, f"resolution ({first}) is ignored: resolutions takes its place")
    elif first == COMMAND_LINE != second:
        yield Implied("resolutions", (), because, f"resolutions ({second}) is ignored: resolution takes its place")
        if cfg.provenance["resolution_weights"] != COMMAND_LINE:
            yield Implied("resolution_weights", (), because)


def _workers(cfg: RunConfig) -> Iterator[Implied]:
    if "data" not in cfg.groups:
        return
    cores = os.cpu_count() or 1
    wanted = cfg.data.max_data_loader_n_workers
    if wanted > cores:
        told = f"max_data_loader_n_workers is {cores}, the number of CPU cores, instead of {wanted}"
        notice = told if cfg.is_given("max_data_loader_n_workers") else ""
        yield Implied("max_data_loader_n_workers", cores, "the number of CPU cores", notice)


def _no_clipping_when_fused(cfg: RunConfig) -> Iterator[Implied]:
    if "precision" not in cfg.groups or cfg.is_given("max_grad_norm"):
        return
    for name in ("fused_backward_pass", "fused_optimizer_groups"):
        if cfg.get(name):
            notice = f"max_grad_norm is 0 (no clipping): {name} frees gradients before the norm of all is known"
            yield Implied("max_grad_norm", 0.0, f"implied by {name}", notice)
            return


def _epoch_sampling(cfg: RunConfig) -> Iterator[Implied]:
    if "preview" in cfg.groups and cfg.preview.sample_every_n_epochs and cfg.preview.sample_every_n_steps:
        yield Implied(
            "sample_every_n_steps",
            None,
            "sample_every_n_epochs takes its place",
            "sample_every_n_steps is ignored: sample_every_n_epochs takes its place",
        )


def _token_name(cfg: RunConfig) -> Iterator[Implied]:
    if cfg.run in TOKENS and cfg.tokens.token_string and not cfg.save.output_name:
        yield Implied("output_name", cfg.tokens.token_string, "the token's name")


def _checkpoint_pattern(cfg: RunConfig) -> Iterator[Implied]:
    """sdxl_gen_img takes a pattern such as models/epoch-*.safetensors when exactly one file fits."""
    if "generate" not in cfg.groups or not cfg.generate.ckpt or os.path.exists(cfg.generate.ckpt):
        return
    found = glob(cfg.generate.ckpt) if any(sign in cfg.generate.ckpt for sign in "*?[") else []
    if len(found) == 1:
        yield Implied("ckpt", found[0], cfg.provenance["ckpt"], f"ckpt is {found[0]}")


_RULES: tuple[Callable[[RunConfig], Iterator[Implied]], ...] = (
    _cache_tools,
    _disk_caches,
    _older_optimizer_names,
    _attention,
    _resolutions,
    _workers,
    _no_clipping_when_fused,
    _epoch_sampling,
    _token_name,
    _checkpoint_pattern,
)

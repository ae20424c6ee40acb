"""Which dtype each part of the model has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.log import get_logger
from library.models import fp8

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.models.bundle import ModelBundle

log = get_logger(__name__)

DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def weight_dtype(mixed_precision: str) -> torch.dtype:
    """dtype of frozen weights under `--mixed_precision` no, fp16 or bf16 (spec conditioning.md section 8)."""
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


def trained_dtype(cfg: RunConfig) -> torch.dtype:
    """dtype of trained weights and their gradients: float32, under autocast, unless `--full_bf16` or `--full_fp16`.

    Optimizer state is float32 in all cases, except with `--full_bf16 --no_stochastic_rounding` (spec conditioning.md
    section 8).
    """
    if cfg.precision.full_bf16:
        return torch.bfloat16
    return torch.float16 if cfg.precision.full_fp16 else torch.float32


def save_dtype(save_precision: str | None) -> torch.dtype | None:
    """dtype of saved tensors under `--save_precision` float, fp16 or bf16; None keeps each tensor's own."""
    return None if save_precision is None else DTYPES[save_precision]


def cast_trained(params: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Give the trained parameters their dtype, in place, before an optimizer sees them."""
    for p in params:
        p.data = p.data.to(dtype)


def store_frozen(cfg: RunConfig, bundle: ModelBundle, *, with_text: bool) -> None:
    """Keep the frozen base in float8 where `--fp8_base` or `--fp8_base_unet` says so, before adapters go on.

    with_text: whether the text encoders still take part; their cached outputs were made at full precision.
    """
    kept = _kept_in_float8(cfg)
    if not kept:
        return
    parts = ["unet"]
    if with_text and kept == "all":
        parts += ["text_encoder_1", "text_encoder_2"]
    for part in parts:
        saved = fp8.store_as_float8(getattr(bundle, part))
        log.info(f"{part}: {saved.before / 1e6:,.1f} MB of weights are {saved.after / 1e6:,.1f} MB with float8")


class _Fp16GradScaler(torch.amp.GradScaler):
    """A scaler that also takes fp16 gradients; torch refuses them because they underflow sooner than float32 ones."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def fp16_gradient_scaler(device: str = "cuda") -> torch.amp.GradScaler:
    """The gradient scaler of `--full_fp16`: gradients are fp16 like the weights."""
    return _Fp16GradScaler(device)


def precision_text(cfg: RunConfig) -> str:
    """The precision of a run in words, for its plan."""
    mixed, precision = cfg.loop.mixed_precision, cfg.precision
    frozen = _name(weight_dtype(mixed))
    frozen += {"": "", "unet": " and float8 (U-Net)", "all": " and float8"}[_kept_in_float8(cfg)]
    text = f"mixed precision {mixed}, trained weights {_name(trained_dtype(cfg))}, frozen weights {frozen}"
    return text + (", stochastic rounding" if precision.full_bf16 and precision.stochastic_rounding else "")


def _kept_in_float8(cfg: RunConfig) -> str:
    """ "": nothing, "unet": the U-Net's frozen weights, "all": the text encoders' too. Only networks have a base."""
    if "frozen" not in cfg.groups or not (cfg.frozen.fp8_base or cfg.frozen.fp8_base_unet):
        return ""
    return "unet" if cfg.frozen.fp8_base_unet else "all"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")

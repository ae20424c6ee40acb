"""Rules about the precision of weights and about fused updates."""

from __future__ import annotations

from library.config.fields import NETWORK
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem

_FUSED = ("fused_backward_pass", "fused_optimizer_groups")


@rule("full_bf16", "full_fp16", "mixed_precision")
def full_precisions_compute_in_their_own(cfg: RunConfig) -> list[Problem]:
    """Half-precision weights are computed with in the same precision, as in sd-scripts."""
    problems = []
    for name, needed in (("full_bf16", "bf16"), ("full_fp16", "fp16")):
        if cfg.get(name) and cfg.loop.mixed_precision != needed:
            what = f"{name} needs mixed_precision {needed}, not {cfg.loop.mixed_precision}"
            fix = f"set mixed_precision to {needed}, or remove {name}"
            problems += conflict(cfg, what, name, "mixed_precision", fix=fix)
    return problems


@rule("fp8_base", "fp8_base_unet", "mixed_precision", runs=NETWORK)
def eight_bits_compute_in_sixteen(cfg: RunConfig) -> list[Problem]:
    """8-bit weights are cast to the precision of the computation; with float32 nothing would be gained by mixing."""
    names = [name for name in ("fp8_base", "fp8_base_unet") if cfg.get(name)]
    if not names or cfg.loop.mixed_precision != "no":
        return []
    what = f"{names[0]} needs mixed_precision bf16 or fp16"
    return conflict(cfg, what, *names, "mixed_precision", fix=f"set mixed_precision to bf16, or remove {names[0]}")


@rule(*_FUSED, "max_grad_norm")
def fused_updates_do_not_clip(cfg: RunConfig) -> list[Problem]:
    """Clipping needs the norm of the whole gradient, of which a fused update has freed most when it is known."""
    names = _fused(cfg)
    if not names or not cfg.is_given("max_grad_norm") or cfg.optim.max_grad_norm == 0:
        return []
    return conflict(
        cfg,
        f"max_grad_norm clips by the norm of the whole gradient, which {names[0]} never holds",
        names[0],
        "max_grad_norm",
        fix=f"set max_grad_norm to 0 (or leave it out), or remove {names[0]}",
    )


@rule(*_FUSED, "mixed_precision")
def fused_updates_are_not_scaled(cfg: RunConfig) -> list[Problem]:
    """The loss scaling of fp16 is judged by the whole gradient."""
    names = _fused(cfg)
    if not names or cfg.loop.mixed_precision != "fp16":
        return []
    return conflict(
        cfg,
        f"{names[0]} cannot be used with mixed_precision fp16: whether the loss was scaled too high is known only when "
        "the whole gradient is there",
        names[0],
        "mixed_precision",
        fix=f"set mixed_precision to bf16, or remove {names[0]}",
    )


@rule(*_FUSED, "optimizer_type")
def fused_updates_are_per_tensor(cfg: RunConfig) -> list[Problem]:
    """Optimizers that estimate one number from all tensors; those that no rule knows are tried out at the start."""
    names, kind = _fused(cfg), cfg.optim.optimizer_type
    if not names or not kind.rpartition(".")[2].startswith(("Prodigy", "DAdapt")):
        return []
    return conflict(
        cfg,
        f"{names[0]} cannot be used with {kind}, which sets its rate from all tensors together",
        names[0],
        "optimizer_type",
        fix=f"remove {names[0]}, or use an optimizer whose update is per tensor, such as AdamW, AdamW8bit or Adafactor",
    )


def _fused(cfg: RunConfig) -> list[str]:
    return [name for name in _FUSED if cfg.get(name)]

"""Rules about generation."""

from __future__ import annotations

from library.config.fields import GENERATOR
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("ckpt", runs=GENERATOR)
def checkpoint_is_named(cfg: RunConfig) -> list[Problem]:
    """Drawing needs a model."""
    if cfg.generate.ckpt:
        return []
    fix = "name a checkpoint file, a diffusers folder, a hub id, or `tiny`, the small model that comes with the suite"
    return [Problem("ckpt is missing", fix=fix)]


@rule("prompt", "from_file", runs=GENERATOR)
def prompt_is_there(cfg: RunConfig) -> list[Problem]:
    """Drawing needs a prompt; an empty one counts when it is given."""
    if cfg.generate.from_file or cfg.is_given("prompt"):
        return []
    return [Problem("there is no prompt", fix="give --prompt or --from_file")]


@rule("fp16", "bf16", runs=GENERATOR)
def one_precision(cfg: RunConfig) -> list[Problem]:
    """fp16 and bf16 exclude each other."""
    if not (cfg.generate.fp16 and cfg.generate.bf16):
        return []
    return conflict(cfg, "fp16 and bf16 are two precisions", "fp16", "bf16", fix="keep one of them")


@rule("network_module", "network_weights", "network_mul", "network_args", "network_merge", runs=GENERATOR)
def networks_match(cfg: RunConfig) -> list[Problem]:
    """Every network has a module and a file; strengths and arguments belong to one of them."""
    modules, weights = len(cfg.generate.network_module), len(cfg.generate.network_weights)
    problems = []
    if modules != weights:
        problems += conflict(
            cfg,
            f"network_module names {modules} and network_weights {weights}: every network needs both",
            "network_module",
            "network_weights",
            fix="name them in the same order",
        )
    for name in ("network_mul", "network_args"):
        if len(cfg.get(name)) > max(modules, weights):
            problems += conflict(cfg, f"{name} has more values than there are networks", name, fix="remove some")
    if cfg.generate.network_merge and not weights and not modules:
        problems += conflict(cfg, "network_merge has no network to merge", "network_merge", fix="name network_weights")
    return problems

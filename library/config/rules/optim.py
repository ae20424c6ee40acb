"""Rules about the optimizer and the learning rate."""

from __future__ import annotations

from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("use_8bit_adam", "optimizer_type")
def one_optimizer(cfg: RunConfig) -> list[Problem]:
    """use_8bit_adam is another way to name the optimizer."""
    if not cfg.optim.use_8bit_adam or cfg.optim.optimizer_type == "AdamW8bit":
        return []
    return conflict(
        cfg,
        "use_8bit_adam and optimizer_type name two optimizers",
        "use_8bit_adam",
        "optimizer_type",
        fix="keep one: optimizer_type = AdamW8bit does what use_8bit_adam did",
    )


@rule("lr_scheduler", "lr_warmup_steps")
def constant_has_no_warmup(cfg: RunConfig) -> list[Problem]:
    """`constant` starts at the full learning rate."""
    if cfg.optim.lr_scheduler not in ("constant", "piecewise_constant") or not cfg.optim.lr_warmup_steps:
        return []
    return conflict(
        cfg,
        f"lr_scheduler {cfg.optim.lr_scheduler} has no warm-up",
        "lr_scheduler",
        "lr_warmup_steps",
        fix="set lr_scheduler to constant_with_warmup, or lr_warmup_steps to 0",
    )


@rule("lr_scheduler", "lr_scheduler_args")
def piecewise_needs_rules(cfg: RunConfig) -> list[Problem]:
    """piecewise_constant needs to be told the pieces."""
    if cfg.optim.lr_scheduler != "piecewise_constant" or "step_rules" in cfg.optim.scheduler_kwargs():
        return []
    return conflict(
        cfg,
        "lr_scheduler piecewise_constant needs step_rules",
        "lr_scheduler",
        fix="""set lr_scheduler_args = ['step_rules="1:100,0.1:200,0.01"']: factor 1 up to step 100, and so on""",
    )


@rule("lr_scheduler_min_lr_ratio", "lr_decay_steps")
def schedulers_that_are_not_there(cfg: RunConfig) -> list[Problem]:
    """Options that belong to schedulers which are not supported yet."""
    problems = []
    if cfg.optim.lr_scheduler_min_lr_ratio is not None:
        what = "lr_scheduler_min_lr_ratio is not supported yet: it acts with lr_scheduler cosine_with_min_lr"
        problems += conflict(cfg, what, "lr_scheduler_min_lr_ratio", fix="remove it")
    if cfg.optim.lr_decay_steps:
        what = "lr_decay_steps is not supported yet: it acts with lr_scheduler warmup_stable_decay"
        problems += conflict(cfg, what, "lr_decay_steps", fix="remove it")
    return problems

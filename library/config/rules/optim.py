"""Rules about the optimizer and the learning rate."""

from __future__ import annotations

from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


def _acts(cfg: RunConfig) -> str:
    """The schedule that acts: its name, "class" for lr_scheduler_type, "" where the optimizer sets the pace itself."""
    if cfg.optim.is_schedule_free or cfg.optim.sets_rate:
        return ""
    return "class" if cfg.optim.lr_scheduler_type else cfg.optim.lr_scheduler


@rule("use_8bit_adam", "use_lion_optimizer", "optimizer_type")
def one_optimizer(cfg: RunConfig) -> list[Problem]:
    """use_8bit_adam and use_lion_optimizer are other ways to name the optimizer."""
    older = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}
    named = [name for name in older if cfg.get(name)]
    if cfg.optim.optimizer_type not in [older[name] for name in named]:
        named = [*named, "optimizer_type"]
    if len(named) < 2:
        return []
    return conflict(
        cfg,
        f"{' and '.join(named)} name two optimizers",
        *named,
        fix=f"keep one: optimizer_type = {older[named[0]]} does what {named[0]} did",
    )


@rule("lr_scheduler", "lr_warmup_steps", "optimizer_type", "optimizer_args")
def constant_has_no_warmup(cfg: RunConfig) -> list[Problem]:
    """`constant` starts at the full learning rate."""
    if _acts(cfg) not in ("constant", "piecewise_constant") or not cfg.optim.lr_warmup_steps:
        return []
    return conflict(
        cfg,
        f"lr_scheduler {cfg.optim.lr_scheduler} has no warm-up",
        "lr_scheduler",
        "lr_warmup_steps",
        fix="set lr_scheduler to constant_with_warmup, or lr_warmup_steps to 0",
    )


@rule("lr_scheduler_type", "lr_warmup_steps", "optimizer_type", "optimizer_args")
def classes_have_no_warmup(cfg: RunConfig) -> list[Problem]:
    """A scheduler class knows nothing of lr_warmup_steps."""
    if _acts(cfg) != "class" or not cfg.optim.lr_warmup_steps:
        return []
    return conflict(
        cfg,
        "lr_scheduler_type has no warm-up of its own",
        "lr_scheduler_type",
        "lr_warmup_steps",
        fix="set lr_warmup_steps to 0, or use a named lr_scheduler",
    )


@rule("lr_scheduler", "lr_scheduler_args", "lr_scheduler_type", "optimizer_type", "optimizer_args")
def piecewise_needs_rules(cfg: RunConfig) -> list[Problem]:
    """piecewise_constant needs to be told the pieces."""
    if _acts(cfg) != "piecewise_constant" or "step_rules" in cfg.optim.scheduler_kwargs():
        return []
    return conflict(
        cfg,
        "lr_scheduler piecewise_constant needs step_rules",
        "lr_scheduler",
        fix="""set lr_scheduler_args = ['step_rules="1:100,0.1:200,0.01"']: factor 1 up to step 100, and so on""",
    )


@rule("lr_scheduler", "lr_scheduler_args", "lr_scheduler_min_lr_ratio", "optimizer_type", "optimizer_args")
def floor_is_given(cfg: RunConfig) -> list[Problem]:
    """The cosine with a floor needs the floor, once."""
    if _acts(cfg) not in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        return []
    ratio = [] if cfg.optim.lr_scheduler_min_lr_ratio is None else ["lr_scheduler_min_lr_ratio"]
    floors = ratio + [name for name in ("min_lr", "min_lr_rate") if name in cfg.optim.scheduler_kwargs()]
    if len(floors) == 1:
        return []
    what = f"names its floor {len(floors)} times" if floors else "needs a floor"
    return conflict(
        cfg,
        f"lr_scheduler {cfg.optim.lr_scheduler} {what}",
        "lr_scheduler",
        "lr_scheduler_min_lr_ratio",
        "lr_scheduler_args",
        fix="set lr_scheduler_min_lr_ratio, such as 0.1 for a tenth of the learning rate, and no min_lr",
    )


@rule("lr_scheduler", "lr_scheduler_type", "optimizer_type", "optimizer_args")
def adafactor_sets_the_rate(cfg: RunConfig) -> list[Problem]:
    """The schedule adafactor shows what an optimizer does; there must be one that does it."""
    if _acts(cfg) != "adafactor":
        return []
    return conflict(
        cfg,
        "lr_scheduler adafactor acts only with the relative steps of Adafactor",
        "lr_scheduler",
        "optimizer_type",
        "optimizer_args",
        fix='set optimizer_type to Adafactor without "relative_step=False", or choose another lr_scheduler',
    )


@rule("optimizer_type", "optimizer_args", "learning_rate", "unet_lr", "text_encoder_lr")
def one_rate_for_all(cfg: RunConfig) -> list[Problem]:
    """D-Adaptation and Prodigy estimate one step size for everything."""
    takes_several = cfg.optim.optimizer_type.endswith("ProdigyPlusScheduleFree")
    if not cfg.optim.estimates_rate or takes_several or "network" not in cfg.groups:
        return []
    network, default = cfg.network, cfg.optim.learning_rate
    rates = (
        set()
        if network.network_train_text_encoder_only
        else {network.unet_lr if network.unet_lr is not None else default}
    )
    if not network.network_train_unet_only:
        rates |= set(network.text_encoder_lr) or {default}
    if len(rates - {0.0}) < 2:
        return []
    return conflict(
        cfg,
        f"{cfg.optim.optimizer_type} takes one learning rate for everything that trains",
        "learning_rate",
        "unet_lr",
        "text_encoder_lr",
        fix="set only learning_rate (1.0 is usual), or use ProdigyPlusScheduleFree",
    )


@rule("optimizer_type", "lr_warmup_steps")
def d_adapt_sgd_starts_at_full_rate(cfg: RunConfig) -> list[Problem]:
    """DAdaptSGD divides by what it saw in its first step, which a rate of 0 leaves at 0."""
    if not cfg.optim.optimizer_type.endswith("DAdaptSGD") or not cfg.optim.lr_warmup_steps:
        return []
    return conflict(
        cfg,
        "DAdaptSGD cannot start at the rate 0 of a warm-up",
        "optimizer_type",
        "lr_warmup_steps",
        fix='set lr_warmup_steps to 0; optimizer_args ["growth_rate=1.02"] makes it start gently',
    )

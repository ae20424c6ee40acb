"""Rules about the full fine-tune."""

from __future__ import annotations

from library.config.fields import FULL
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("cache_text_encoder_outputs", "train_text_encoder", runs=FULL)
def cached_text_encoders_stay(cfg: RunConfig) -> list[Problem]:
    """Text encoders whose outputs are cached cannot be trained."""
    if not cfg.data.cache_text_encoder_outputs or not cfg.finetune.train_text_encoder:
        return []
    return conflict(
        cfg,
        "cache_text_encoder_outputs and train_text_encoder exclude each other: cached captions do not learn",
        "cache_text_encoder_outputs",
        "train_text_encoder",
        fix="leave out one of them",
    )


@rule("learning_rate", "train_text_encoder", "learning_rate_te1", "learning_rate_te2", "block_lr", runs=FULL)
def something_has_a_rate(cfg: RunConfig) -> list[Problem]:
    """At least one part has to train."""
    finetune, rate = cfg.finetune, cfg.optim.learning_rate
    unet = rate and (any(finetune.block_lr) or not finetune.block_lr)
    own = (finetune.learning_rate_te1, finetune.learning_rate_te2)
    text = finetune.train_text_encoder and any(rate if each is None else each for each in own)
    if unet or text:
        return []
    return conflict(cfg, "every rate is 0, so nothing would train", "learning_rate", fix="set learning_rate above 0")

"""Rules about new tokens."""

from __future__ import annotations

from library.config.fields import NETWORK, TOKENS
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.config.token_table import read_templates, template_file, token_specs, trains_tokens
from library.config.tokens import PivotalOptions, TokenOptions
from library.errors import Problem, UserError

_RUNS = TOKENS | NETWORK
_TEMPLATES = ("use_object_template", "use_style_template", "token_template_file")


@rule("token_string", "token_file", "init_word", "weights", "num_vectors_per_token", "train_tokens", runs=_RUNS)
def tokens_are_named(cfg: RunConfig) -> list[Problem]:
    """There is a token, named in one place, and its name can be used."""
    if not trains_tokens(cfg):
        return []
    options = cfg.tokens
    others = [name for name in ("token_string", "init_word", "weights", "num_vectors_per_token") if cfg.is_given(name)]
    if options.token_file and others:
        what = f"token_file says all about the tokens, {' and '.join(others)} cannot stand beside it"
        return conflict(cfg, what, "token_file", *others, fix="keep token_file, or the others")
    if not options.token_file and options.token_string is None:
        return [Problem("there is no token to train", fix="set token_string to a new word, or token_file for several")]
    try:
        specs = token_specs(cfg)
    except UserError as error:
        return list(error.problems)
    dotted = [spec.name for spec in specs if "." in spec.name]
    if "pivotal" in cfg.groups and cfg.pivotal.bundle_tokens and dotted:
        what = f"the token {dotted[0]} cannot be put into the network's file, where a dot ends its name"
        return conflict(cfg, what, "bundle_tokens", fix="rename the token, or remove bundle_tokens")
    return []


@rule(*TokenOptions.model_fields, *PivotalOptions.model_fields, runs=NETWORK)
def tokens_are_asked_for(cfg: RunConfig) -> list[Problem]:
    """What is said about tokens needs train_tokens."""
    names = (*TokenOptions.model_fields, *PivotalOptions.model_fields)
    given = [name for name in names if cfg.is_given(name) and cfg.get(name) not in (None, False)]
    if cfg.pivotal.train_tokens or not given:
        return []
    what = f"{' and '.join(given)} cannot act without train_tokens"
    return conflict(cfg, what, *given, fix="set train_tokens, or leave it out")


@rule(*_TEMPLATES, "token_file", "train_tokens", runs=_RUNS)
def one_template(cfg: RunConfig) -> list[Problem]:
    """Sentences come from one place and have room for one token."""
    given = [name for name in _TEMPLATES if cfg.get(name)]
    if not trains_tokens(cfg) or not given:
        return []
    if len(given) > 1:
        what = f"{' and '.join(given)} are several templates"
        return conflict(cfg, what, *given, fix="keep one of them")
    if cfg.tokens.token_file:
        what = f"{given[0]} has room for one token, and token_file names several"
        return conflict(cfg, what, given[0], "token_file", fix="use captions that say which token a picture shows")
    path = template_file(cfg)
    if path is None or not path.is_file():
        return []
    try:
        read_templates(path)
    except UserError as error:
        return list(error.problems)
    return []


@rule("cache_text_encoder_outputs", "text_encoder_batch_size", "train_tokens", runs=_RUNS)
def tokens_are_encoded_anew(cfg: RunConfig) -> list[Problem]:
    """Cached texts hold no token that learns."""
    if not trains_tokens(cfg):
        return []
    if not cfg.data.cache_text_encoder_outputs:
        if not cfg.is_given("text_encoder_batch_size"):
            return []
        what = "text_encoder_batch_size cannot act while tokens are trained: it is about filling a cache of captions"
        return conflict(
            cfg, what, "text_encoder_batch_size", fix="remove it; train_batch_size says how many are encoded"
        )
    what = "cache_text_encoder_outputs cannot be used while tokens are trained: cached captions do not learn"
    return conflict(cfg, what, "cache_text_encoder_outputs", fix="leave the cache out")


@rule("token_norm_decay", "optimizer_type", "train_tokens", runs=_RUNS)
def token_norms_can_be_moved(cfg: RunConfig) -> list[Problem]:
    """The optimizer must not keep a copy of the vectors."""
    if not trains_tokens(cfg) or not cfg.tokens.token_norm_decay or not cfg.optim.is_schedule_free:
        return []
    return conflict(
        cfg,
        f"token_norm_decay cannot be used with {cfg.optim.optimizer_type}, which keeps averages of the vectors",
        "token_norm_decay",
        "optimizer_type",
        fix="remove it, or use an optimizer with a schedule",
    )


@rule("token_lr", "learning_rate", "optimizer_type", "train_tokens", runs=NETWORK)
def token_rate_fits(cfg: RunConfig) -> list[Problem]:
    """Tokens have a rate, and no other one than the network where the optimizer knows only one."""
    if not cfg.pivotal.train_tokens:
        return []
    rate = cfg.optim.learning_rate if cfg.pivotal.token_lr is None else cfg.pivotal.token_lr
    name = "learning_rate" if cfg.pivotal.token_lr is None else "token_lr"
    if not rate:
        return conflict(cfg, f"{name} 0 would leave the tokens as they are", name, fix="set token_lr above 0")
    several = cfg.optim.estimates_rate and not cfg.optim.optimizer_type.endswith("ProdigyPlusScheduleFree")
    if not several or rate == cfg.optim.learning_rate:
        return []
    what = f"{cfg.optim.optimizer_type} takes one learning rate for everything that trains"
    return conflict(cfg, what, "learning_rate", "token_lr", fix="set only learning_rate (1.0 is usual)")


@rule("learning_rate", runs=TOKENS)
def tokens_have_a_rate(cfg: RunConfig) -> list[Problem]:
    """At rate 0 nothing would train."""
    if cfg.optim.learning_rate:
        return []
    return conflict(cfg, "learning_rate 0 would leave the tokens as they are", "learning_rate", fix="set it above 0")

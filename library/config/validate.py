"""Rules between options: small functions that return Problems; all of them run, so all are reported together."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from library.config.fields import ADMIN, GENERATOR, LATENTS, REPORT, SHARED, TRAINER
from library.config.run_config import RunConfig
from library.config.values import shown
from library.errors import Problem


@dataclass(frozen=True)
class Rule:
    """A check over some options in some runs; it is left out when one of its options has a wrong value already."""

    check: Callable[[RunConfig], list[Problem]]
    options: tuple[str, ...]
    runs: frozenset[str]


RULES: list[Rule] = []


def rule(*options: str, runs: frozenset[str] = TRAINER) -> Callable[[Callable[[RunConfig], list[Problem]]], Callable]:
    """Register a check over `options` for `runs`."""

    def register(check: Callable[[RunConfig], list[Problem]]) -> Callable[[RunConfig], list[Problem]]:
        RULES.append(Rule(check, options, runs))
        return check

    return register


def check_rules(cfg: RunConfig, *, wrong: Collection[str] = ()) -> list[Problem]:
    """The problems of all rules of this run; `wrong` names options whose values are reported already."""
    return [
        problem
        for entry in RULES
        if cfg.run in entry.runs and not set(entry.options) & set(wrong)
        for problem in entry.check(cfg)
    ]


def origin(cfg: RunConfig, *names: str) -> str:
    """Where the given options were set, in one line: "cache_latents = true (run.toml line 3)"."""
    return ", ".join(
        f"{name} = {shown(cfg.get(name)) if cfg.get(name) is not None else 'unset'} ({cfg.provenance[name]})"
        for name in names
    )


def conflict(cfg: RunConfig, what: str, *names: str, fix: str) -> list[Problem]:
    """A problem between the named options."""
    return [Problem(what, origin(cfg, *names), fix)]


# --- model ---------------------------------------------------------------------------------------------------------


@rule("pretrained_model_name_or_path", runs=SHARED)
def model_is_named(cfg: RunConfig) -> list[Problem]:
    """A run needs a base model."""
    if cfg.model.pretrained_model_name_or_path:
        return []
    fix = "name a checkpoint file, a diffusers folder, a hub id, or `tiny`, the small model that comes with the suite"
    return [Problem("pretrained_model_name_or_path is missing", fix=fix)]


# --- data ----------------------------------------------------------------------------------------------------------


@rule("train_data_dir", "in_json", "dataset_config", runs=SHARED | ADMIN | REPORT)
def data_is_named(cfg: RunConfig) -> list[Problem]:
    """A run needs images."""
    if cfg.data.train_data_dir or cfg.data.in_json or cfg.data.dataset_config:
        return []
    return [Problem("there is no data", fix="set train_data_dir, in_json or dataset_config")]


@rule("in_json", "reg_data_dir", "dataset_config", runs=SHARED | ADMIN | REPORT)
def metadata_has_no_regularisation(cfg: RunConfig) -> list[Problem]:
    """Regularisation images come with folders, not with a metadata file."""
    if not (cfg.data.in_json and cfg.data.reg_data_dir) or cfg.data.dataset_config:
        return []
    return conflict(
        cfg,
        "in_json and reg_data_dir cannot be used together",
        "in_json",
        "reg_data_dir",
        fix="describe both in a dataset_config: one dataset with metadata_file, one of folders with is_reg",
    )


@rule("cache_latents", "cache_latents_moments", "cache_in_background", runs=TRAINER | LATENTS)
def latents_are_cached(cfg: RunConfig) -> list[Problem]:
    """What is said about the cache of latents needs one."""
    names = [name for name in ("cache_latents_moments", "cache_in_background") if cfg.get(name)]
    if cfg.data.cache_latents or not names:
        return []
    what = f"{' and '.join(names)} need{'s' if len(names) == 1 else ''} cache_latents"
    return conflict(cfg, what, *names, fix="add cache_latents, or cache_latents_to_disk")


@rule("cache_text_encoder_outputs", "network_train_unet_only")
def cached_text_is_not_trained(cfg: RunConfig) -> list[Problem]:
    """Text encoders whose outputs are cached cannot be trained."""
    if not cfg.data.cache_text_encoder_outputs or cfg.network.network_train_unet_only:
        return []
    return conflict(
        cfg,
        "cache_text_encoder_outputs needs network_train_unet_only: cached text encoders cannot be trained",
        "cache_text_encoder_outputs",
        fix="set network_train_unet_only, or leave the cache out",
    )


@rule("cache_store", "cache_latents_to_disk", "cache_text_encoder_outputs_to_disk")
def caches_are_on_disk(cfg: RunConfig) -> list[Problem]:
    """How caches are kept on disk matters when there is one."""
    if cfg.data.cache_store == "npz" or cfg.data.cache_latents_to_disk or cfg.data.cache_text_encoder_outputs_to_disk:
        return []
    return conflict(
        cfg,
        "cache_store cannot act: nothing is cached on disk",
        "cache_store",
        fix="set cache_latents_to_disk or cache_text_encoder_outputs_to_disk",
    )


@rule("text_cache_variants", "cache_text_encoder_outputs")
def variants_are_cached(cfg: RunConfig) -> list[Problem]:
    """Variants are what a text cache keeps; without one every visit has a wording of its own."""
    if cfg.data.text_cache_variants == 1 or cfg.data.cache_text_encoder_outputs:
        return []
    return conflict(
        cfg,
        "text_cache_variants acts with cache_text_encoder_outputs only: without it every wording is encoded anew",
        "text_cache_variants",
        fix="set cache_text_encoder_outputs, or leave text_cache_variants out",
    )


# --- diffusion -----------------------------------------------------------------------------------------------------


@rule("min_timestep", "max_timestep")
def timesteps_are_left(cfg: RunConfig) -> list[Problem]:
    """Timesteps are drawn from [min_timestep, max_timestep)."""
    if cfg.diffusion.min_timestep < cfg.diffusion.max_timestep:
        return []
    return conflict(
        cfg,
        "min_timestep must be below max_timestep: no timestep is left to draw",
        "min_timestep",
        "max_timestep",
        fix="timesteps are drawn from min_timestep up to, not including, max_timestep",
    )


# --- optimizer -----------------------------------------------------------------------------------------------------


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


# --- network -------------------------------------------------------------------------------------------------------


@rule("network_train_unet_only", "network_train_text_encoder_only")
def something_is_trained(cfg: RunConfig) -> list[Problem]:
    """The two restrictions exclude each other."""
    if not (cfg.network.network_train_unet_only and cfg.network.network_train_text_encoder_only):
        return []
    return conflict(
        cfg,
        "network_train_unet_only and network_train_text_encoder_only leave nothing to train",
        "network_train_unet_only",
        "network_train_text_encoder_only",
        fix="keep one of them, or none to train both",
    )


@rule("dim_from_weights", "network_weights")
def ranks_come_from_a_file(cfg: RunConfig) -> list[Problem]:
    """dim_from_weights reads network_weights."""
    if not cfg.network.dim_from_weights or cfg.network.network_weights:
        return []
    return conflict(
        cfg, "dim_from_weights needs network_weights", "dim_from_weights", fix="name the file that holds the ranks"
    )


# --- saving --------------------------------------------------------------------------------------------------------


@rule("output_dir")
def output_is_named(cfg: RunConfig) -> list[Problem]:
    """A training run has to put its result somewhere."""
    if cfg.save.output_dir:
        return []
    return [Problem("output_dir is missing", fix="name the folder for the trained model")]


# --- sample pictures -----------------------------------------------------------------------------------------------


@rule("sample_prompts", "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
def samples_need_prompts(cfg: RunConfig) -> list[Problem]:
    """Drawing needs prompts."""
    names = [
        name
        for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
        if cfg.get(name) and cfg.is_given(name)
    ]
    if cfg.preview.sample_prompts or not names:
        return []
    what = f"{' and '.join(names)} need{'s' if len(names) == 1 else ''} sample_prompts"
    return conflict(cfg, what, *names, fix="name a prompt file in sample_prompts")


# --- looking after caches ------------------------------------------------------------------------------------------


@rule("command", "yes", "remove", "delete_broken", runs=ADMIN)
def command_is_named(cfg: RunConfig) -> list[Problem]:
    """The tool does one of several things, and some options belong to one of them."""
    if cfg.admin.command is None:
        return [Problem("there is nothing to do", fix="name a command: status, verify, pack, unpack or clean")]
    belongs = {"yes": "clean", "remove": "pack", "delete_broken": "verify"}
    wrong = [name for name, command in belongs.items() if cfg.get(name) and cfg.admin.command != command]
    return [
        problem
        for name in wrong
        for problem in conflict(
            cfg, f"{name} cannot act in {cfg.admin.command}", name, fix=f"it belongs to the command {belongs[name]}"
        )
    ]


# --- generation ----------------------------------------------------------------------------------------------------


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

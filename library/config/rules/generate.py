"""Rules about generation."""

from __future__ import annotations

from library.config.choices import FLOW_SAMPLERS, default_eta, split_sampler
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


@rule("prompt", "from_file", "from_module", "interactive", "image_path", runs=GENERATOR)
def prompt_is_there(cfg: RunConfig) -> list[Problem]:
    """Drawing needs a prompt, someone to ask, or pictures that may hold one; an empty one counts when it is given."""
    made = cfg.generate.from_file or cfg.prompter.from_module
    if made or cfg.is_given("prompt") or cfg.generate.interactive or cfg.img2img.image_path:
        return []
    return [Problem("there is no prompt", fix="give --prompt or --from_file, or --interactive to be asked")]


@rule("shuffle_prompts", "from_file", "from_module", runs=GENERATOR)
def something_is_shuffled(cfg: RunConfig) -> list[Problem]:
    """Only the prompts of a file have an order."""
    if not cfg.generate.shuffle_prompts or cfg.generate.from_file or cfg.prompter.from_module:
        return []
    what = "shuffle_prompts has nothing to shuffle: the prompts of from_file have an order, one prompt has none"
    return conflict(cfg, what, "shuffle_prompts", fix="name from_file, or remove it")


@rule("sampler", "prediction_type", "v_parameterization", "zero_terminal_snr", runs=GENERATOR)
def sampler_can_draw_the_model(cfg: RunConfig) -> list[Problem]:
    """What the options say about the model fits the sampler; what the checkpoint says is only known when it is open."""
    options, problems = cfg.generate, []
    basic, spread = split_sampler(options.sampler)
    if options.prediction_type == "rectified_flow" and options.sampler not in FLOW_SAMPLERS:
        what, fix = f"{options.sampler} cannot draw a model of rectified flow", "take " + ", ".join(FLOW_SAMPLERS)
        problems += conflict(cfg, what, "sampler", "prediction_type", fix=fix)
    elif options.zero_terminal_snr and (basic == "pndm" or spread):
        what = f"{options.sampler} cannot draw a model with zero terminal SNR"
        fix = f"take {basic}" if spread else "take another sampler, such as ddim or euler_a"
        problems += conflict(cfg, what, "sampler", "zero_terminal_snr", fix=fix)
    return problems


@rule("sampler", "eta", "prediction_type", runs=GENERATOR)
def eta_has_a_sampler(cfg: RunConfig) -> list[Problem]:
    """eta acts with samplers that add noise in a share of their own."""
    options = cfg.generate
    if options.eta is None or (
        default_eta(options.sampler) is not None and options.prediction_type != "rectified_flow"
    ):
        return []
    flow = default_eta(options.sampler) is not None
    what = "eta cannot act on rectified flow" if flow else f"{options.sampler} has no eta"
    return conflict(
        cfg,
        what,
        "eta",
        "prediction_type" if flow else "sampler",
        fix="remove eta" if flow else "remove eta, or take ddim, euler_a or dpmpp_sde",
    )


@rule("fp16", "bf16", runs=GENERATOR)
def one_precision(cfg: RunConfig) -> list[Problem]:
    """fp16 and bf16 exclude each other."""
    if not (cfg.generate.fp16 and cfg.generate.bf16):
        return []
    return conflict(cfg, "fp16 and bf16 are two precisions", "fp16", "bf16", fix="keep one of them")


@rule(
    "network_merge",
    "network_merge_n_models",
    "network_pre_calc",
    "network_show_meta",
    "network_module",
    "network_weights",
    runs=GENERATOR,
)
def networks_are_merged_or_live(cfg: RunConfig) -> list[Problem]:
    """What is said about merging fits the networks, and something is left for what is said about the others."""
    options, problems = cfg.generate, []
    count, first = len(options.network_weights), options.network_merge_n_models
    for name in ("network_merge", "network_pre_calc", "network_show_meta"):
        if cfg.get(name) and not count and not options.network_module:
            problems += conflict(cfg, f"{name} has no network to act on", name, fix="name network_weights")
    if first is not None and options.network_merge:
        names = ("network_merge", "network_merge_n_models")
        problems += conflict(cfg, "network_merge merges all networks, not the first N", *names, fix="keep one of them")
    elif first is not None and first > count:
        what = f"network_merge_n_models is {first}, and there are {count} networks"
        problems += conflict(cfg, what, "network_merge_n_models", fix="lower it, or name more network_weights")
    if options.network_pre_calc and count and (options.network_merge or first == count):
        problems += conflict(
            cfg,
            "network_pre_calc has no network to act on: all are merged",
            "network_pre_calc",
            fix="remove it, or merge fewer networks",
        )
    return problems


@rule("network_module", "network_weights", "network_mul", "network_args", "network_block_weights", runs=GENERATOR)
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
    for name in ("network_mul", "network_args", "network_block_weights"):
        if len(cfg.get(name)) > max(modules, weights):
            problems += conflict(cfg, f"{name} has more values than there are networks", name, fix="remove some")
    return problems

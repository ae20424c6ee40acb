"""Rules about Deep Shrink and Gradual Latent."""

from __future__ import annotations

from library.config.choices import split_sampler
from library.config.fields import GENERATOR
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem

_SHRINK = ("ds_timesteps_1", "ds_depth_2", "ds_timesteps_2", "ds_ratio")
_GRADUAL = (
    "gradual_latent_ratio", "gradual_latent_ratio_step", "gradual_latent_every_n_steps", "gradual_latent_s_noise",
    "gradual_latent_unsharp_params",
)  # fmt: skip
_PROMPTS = ("prompt", "from_file", "from_module", "interactive")


def _prompts_may_say(cfg: RunConfig, start: str) -> bool:
    """Whether there may be prompts with options that begin so: those of a file or program are not known yet."""
    options = cfg.generate
    elsewhere = options.from_file or cfg.prompter.from_module or options.interactive
    return bool(elsewhere or f"--{start}" in (options.prompt or "").lower())


@rule("ds_depth_1", *_SHRINK, *_PROMPTS, runs=GENERATOR)
def deep_shrink_can_act(cfg: RunConfig) -> list[Problem]:
    """What is said about Deep Shrink has a depth, here or in a prompt, and the second one timesteps of its own."""
    options, problems = cfg.unet_effects, []
    if options.ds_depth_1 is None and not _prompts_may_say(cfg, "ds"):
        for name in filter(cfg.is_given, _SHRINK):
            problems += conflict(cfg, f"{name} cannot act without ds_depth_1", name, fix="set ds_depth_1, such as 3")
    elif options.ds_depth_2 is not None and options.ds_timesteps_2 >= options.ds_timesteps_1:
        if not _prompts_may_say(cfg, "dst"):
            first, second = options.ds_timesteps_1, options.ds_timesteps_2
            what = f"ds_depth_2 cannot act: it does from ds_timesteps_1 ({first}) down to ds_timesteps_2 ({second})"
            problems += conflict(cfg, what, "ds_depth_2", "ds_timesteps_2", fix="lower ds_timesteps_2")
    elif cfg.is_given("ds_timesteps_2") and options.ds_depth_2 is None and not _prompts_may_say(cfg, "dsd2"):
        what = "ds_timesteps_2 cannot act without ds_depth_2"
        problems += conflict(cfg, what, "ds_timesteps_2", fix="set ds_depth_2")
    return problems


@rule("gradual_latent_timesteps", *_GRADUAL, "sampler", "image_path", *_PROMPTS, runs=GENERATOR)
def gradual_latent_can_act(cfg: RunConfig) -> list[Problem]:
    """What is said about Gradual Latent is asked for, here or in a prompt; the sampler is euler_a, the start noise."""
    begins, sampler, problems = cfg.unet_effects.gradual_latent_timesteps, cfg.generate.sampler, []
    if begins is None and not _prompts_may_say(cfg, "gl"):
        for name in filter(cfg.is_given, _GRADUAL):
            what, fix = (
                f"{name} cannot act without gradual_latent_timesteps",
                "set gradual_latent_timesteps, such as 650",
            )
            problems += conflict(cfg, what, name, fix=fix)
    given = [name for name in ("gradual_latent_timesteps", *_GRADUAL) if cfg.is_given(name)]
    if given and not problems and split_sampler(sampler)[0] != "euler_a":
        what = f"{given[0]} cannot act with {sampler}: Gradual Latent is for euler_a"
        problems += conflict(cfg, what, given[0], "sampler", fix="take sampler euler_a")
    if given and not problems and cfg.img2img.image_path:
        what = f"{given[0]} cannot act: Gradual Latent begins with noise, and here pictures are drawn over"
        problems += conflict(cfg, what, given[0], "image_path", fix="remove one of them")
    return problems

"""Rules about the files that picture generation writes."""

from __future__ import annotations

from library.config.fields import GENERATOR
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("resume_bulk", "prompts_per_rank", "grid", "interactive", runs=GENERATOR)
def what_is_typed_is_not_planned(cfg: RunConfig) -> list[Problem]:
    """Going on, sharing out and contact sheets need all prompts before the first picture."""
    if not cfg.generate.interactive:
        return []
    return [
        problem
        for name in ("resume_bulk", "prompts_per_rank", "grid")
        if cfg.get(name)
        for problem in conflict(
            cfg, f"{name} cannot act on prompts that are typed", name, "interactive", fix="remove one of them"
        )
    ]


@rule("resume_bulk", "prompts_per_rank", "from_module", "from_file", "seed", runs=GENERATOR)
def programs_say_the_same_again(cfg: RunConfig) -> list[Problem]:
    """Without a seed the random numbers that a program is given are others each time and in each process."""
    if cfg.generate.seed is not None or not cfg.prompter.from_module or cfg.generate.from_file:
        return []
    return [
        problem
        for name in ("resume_bulk", "prompts_per_rank")
        if cfg.get(name)
        for problem in conflict(
            cfg,
            f"{name} needs the same prompts again, and from_module has no seed",
            name,
            "from_module",
            fix="set seed",
        )
    ]


@rule("resume_bulk", "prompts_per_rank", "grid", "parameters_file", runs=GENERATOR)
def what_is_there_is_written_down(cfg: RunConfig) -> list[Problem]:
    """parameters.jsonl tells a run that goes on, and ranks that wait for each other's pictures, what is there."""
    options = cfg.pictures
    if options.parameters_file:
        return []
    fix = "remove no_parameters_file"
    if options.resume_bulk:
        what = "resume_bulk goes by parameters.jsonl, which is switched off"
        return conflict(cfg, what, "resume_bulk", "parameters_file", fix=fix)
    if options.prompts_per_rank and options.grid:
        what = "the ranks of a grid go by parameters.jsonl, which is switched off"
        return conflict(cfg, what, "prompts_per_rank", "grid", "parameters_file", fix=fix)
    return []


@rule("grid", "shuffle_prompts", runs=GENERATOR)
def a_grid_has_an_order(cfg: RunConfig) -> list[Problem]:
    """The rows of a contact sheet are in the order of the file."""
    if not (cfg.pictures.grid and cfg.generate.shuffle_prompts):
        return []
    what = "shuffle_prompts cannot act on a grid, whose rows are in the order of the prompts"
    return conflict(cfg, what, "shuffle_prompts", "grid", fix="remove one of them")


@rule("grid", "image_path", "prompt", "from_file", runs=GENERATOR)
def a_grid_has_prompts(cfg: RunConfig) -> list[Problem]:
    """Prompts out of pictures belong to one picture each, and a contact sheet draws every prompt several times."""
    if not (cfg.pictures.grid and cfg.img2img.image_path) or cfg.generate.from_file or cfg.is_given("prompt"):
        return []
    what = "grid cannot act on the prompts that the pictures of image_path hold"
    return conflict(cfg, what, "grid", "image_path", fix="give --prompt or --from_file")

"""Rules about Python files that make prompts."""

from __future__ import annotations

from library.config.fields import GENERATOR
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("prompter_module_args", "from_module", runs=GENERATOR)
def arguments_have_a_module(cfg: RunConfig) -> list[Problem]:
    """What is said to a program needs one."""
    if cfg.prompter.prompter_module_args is None or cfg.prompter.from_module:
        return []
    what = "prompter_module_args cannot act: no program makes prompts"
    return conflict(cfg, what, "prompter_module_args", fix="name from_module, or remove it")


@rule("grid", "from_module", "from_file", runs=GENERATOR)
def sheets_have_lines_that_stay(cfg: RunConfig) -> list[Problem]:
    """A contact sheet draws the same lines again and again, and a program may make others each time."""
    if not cfg.pictures.grid or not cfg.prompter.from_module or cfg.generate.from_file:
        return []
    what = "grid cannot act on from_module, which may make other prompts each time"
    return conflict(cfg, what, "grid", "from_module", fix="write the prompts into a file and name it in from_file")

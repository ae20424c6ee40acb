"""Rules about looking after caches."""

from __future__ import annotations

from library.config.fields import ADMIN
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


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

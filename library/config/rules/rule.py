"""What a rule between options is: a small function that returns Problems, registered with `rule`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from library.config.fields import TRAINER
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


def origin(cfg: RunConfig, *names: str) -> str:
    """Where the given options were set, in one line: "cache_latents = true (run.toml line 3)"."""
    return ", ".join(
        f"{name} = {shown(cfg.get(name)) if cfg.get(name) is not None else 'unset'} ({cfg.provenance[name]})"
        for name in names
    )


def conflict(cfg: RunConfig, what: str, *names: str, fix: str) -> list[Problem]:
    """A problem between the named options."""
    return [Problem(what, origin(cfg, *names), fix)]

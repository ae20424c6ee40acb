"""Errors meant for the user: what is wrong, where it comes from, how to get out of it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing the user has to change: a sentence, the place it comes from, the way out."""

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class UserError(Exception):
    """A problem that the user can solve; carries one or several `Problem`s and is printed without a traceback."""

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, where, fix),)
        super().__init__(what, where, fix)

    @classmethod
    def from_problems(cls, problems: Iterable[Problem]) -> UserError:
        """One error out of several problems, in the order given; at least one is needed."""
        collected = tuple(problems)
        assert collected, "an error needs a problem"
        first = collected[0]
        error = cls(first.what, first.where, first.fix)
        error.problems = collected
        return error

    def __reduce__(self) -> tuple[object, ...]:  # data-loader workers send their errors through pickle
        return (type(self), self.args, {"problems": self.problems})

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


def entry_point(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate `main(argv=None)`: a `UserError` is printed to stderr and gives exit code 2, Ctrl-C gives 130.

    Every other exception keeps its traceback, because it is our defect and not the user's.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except UserError as error:
            print(_report(error), file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130

    return run


def _report(error: UserError) -> str:
    """All problems, numbered when there are several; ranks other than 0 stay short, since they repeat rank 0."""
    rank = int(os.environ.get("RANK", "0") or 0)
    if rank != 0:
        return f"[rank {rank}] error: {error.problems[0].what}"
    if len(error.problems) == 1:
        return f"error: {error.problems[0]}"
    numbered = [f"{number}. {problem}" for number, problem in enumerate(error.problems, start=1)]
    return "\n".join([f"{len(numbered)} problems:", *numbered])

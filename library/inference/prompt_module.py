"""Prompts that a Python file of the user's makes, with the interface of sd-scripts (gen_img.md section 2). No torch.

The file has a function get_prompter(args, pipe, networks). What it returns is called for one prompt line after the
other, until it gives None: prompter(args, pipe, seed_random, iter_seed, prompt_index, global_step). All prompts are
asked for before the model is loaded, so pipe is None and networks is empty.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

from library.errors import UserError
from library.inference.prompt_source import PromptLine
from library.log import get_logger

if TYPE_CHECKING:
    from library.config.run_config import RunConfig

logger = get_logger(__name__)

_NAME = "prompt_module_of_the_run"
MOST = 100_000  # prompts of one time through; a program that gives more has no end


class PromptModule:
    """The prompts of a file; calling it goes through them once."""

    def __init__(self, path: str, cfg: RunConfig) -> None:
        self._path, self._step = path, cfg.generate.images_per_prompt
        self._shuffled = cfg.generate.shuffle_prompts
        self._args = SimpleNamespace(**cfg.flat())
        self._random = random.Random(cfg.generate.seed)
        with _failures_told(path):
            module = _imported(path)
        if not hasattr(module, "get_prompter"):
            fix = "define get_prompter(args, pipe, networks)"
            raise UserError("the file has no function get_prompter", path, fix)
        with _failures_told(path):
            self._prompter = module.get_prompter(self._args, None, [])
        if self._shuffled and not hasattr(self._prompter, "shuffle"):
            raise UserError("its prompter has no method shuffle()", path, "define it, or remove shuffle_prompts")

    def __call__(self, iter_seed: int | None) -> list[PromptLine]:
        """The lines of one time through, in the order in which they are drawn.

        iter_seed: the seed that the pictures of this time share; None: each has its own. Raises UserError when what
        comes is no text, or does not end, or the program fails.
        """
        if self._shuffled:
            with _failures_told(self._path):
                self._prompter.shuffle()
        lines: list[PromptLine] = []
        while True:
            number = len(lines)
            with _failures_told(self._path):
                line = self._prompter(self._args, None, self._random, iter_seed, number, number * self._step)
            if line is None:
                return lines
            if not isinstance(line, str):
                what = f"prompt {number + 1} is no text but {type(line).__name__}"
                raise UserError(what, self._path, "return a line of text, or None at the end")
            if number == MOST:
                raise UserError(f"there is no end after {MOST} prompts", self._path, "return None at the end")
            lines.append(PromptLine(line.strip(), f"{self._path} prompt {number + 1}"))


def prompt_module(cfg: RunConfig) -> PromptModule | None:
    """The program that makes a run's prompts; None when there is none, or a file of prompts comes before it."""
    path = cfg.prompter.from_module
    return PromptModule(path, cfg) if path and not cfg.generate.from_file else None


@contextmanager
def _failures_told(path: str) -> Iterator[None]:
    """An error of the user's program as a UserError with the line of its file; console_log_level DEBUG shows it all."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        logger.debug("%s failed", path, exc_info=True)
        here = os.path.abspath(path)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == here]
        if isinstance(error, SyntaxError) and error.filename == here:
            lines = [error.lineno]
        what = f"the program failed with {type(error).__name__}: {error}"
        raise UserError(what, f"{path} line {lines[-1]}" if lines else path, "mend the program") from error


def _imported(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, Path(path))
    if spec is None or spec.loader is None:
        raise UserError("this is no Python file", path, "name a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickles look for the module of a class
    spec.loader.exec_module(module)
    return module

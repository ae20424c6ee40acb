"""Prompts that are typed one after the other while the model stays loaded."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from library.errors import UserError
from library.inference.prompt_source import PromptLine

ASK = "prompt> "


def ask_and_draw(draw: Callable[[PromptLine], Sequence[Path]], *, read: Callable[[str], str] = input) -> None:
    """Read lines until the input ends, draw each, and print where its pictures are.

    A line that cannot be drawn is explained and the next one is asked for; blank lines are asked again. Where Python
    has readline, lines can be edited and called back. UserError when the input is not text.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  it is enough to import it: input() then uses it
    number = 0
    while True:
        try:
            text = read(ASK).strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("what is typed is not text in the terminal's encoding", "--interactive") from None
        number += 1
        if not text:
            continue
        try:
            for path in draw(PromptLine(text, f"input line {number}")):
                print(f"  {path}", flush=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)

"""Options of Python files that make prompts."""

from __future__ import annotations

from typing import ClassVar

from library.config.fields import GENERATOR, Group, option


class PrompterOptions(Group):
    """Where prompts come from when a program makes them."""

    title: ClassVar[str] = "prompts from a program"
    acts: ClassVar[frozenset[str]] = GENERATOR

    from_module: str | None = option(
        None, "Python file whose function get_prompter(args, pipe, networks) makes prompts (docs/prompts.md)", path=True
    )
    prompter_module_args: str | None = option(None, "text for that file, which finds it in args")

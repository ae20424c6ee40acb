"""The argparse surface of the option groups: help text, and flags with their raw values."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from library.config.fields import Group, Option
from library.config.known_flags import foreign_flag, notice_without_effect
from library.config.runs import Run
from library.config.toml_file import toml_value
from library.errors import Problem, UserError

COMMAND_LINE = "command line"
_NO_VALUE = object()  # stands behind a flag that was given without the value it needs
_METAVARS = {"int": "N", "float": "NUMBER", "share": "N|SHARE", "size": "SIZE", "span": "LOW,HIGH", "str": "TEXT"}


@dataclass
class CommandLine:
    """What stands on the command line: values by option name, the meta flags, and what is wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    config_file: str | None = None
    output_config: bool = False
    print_config: bool = False
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def read_command_line(run: Run, argv: Sequence[str] | None) -> CommandLine:
    """Read flags without judging their values; `--help` prints and exits with 0."""
    parser = build_parser(run)
    try:
        found, rest = parser.parse_known_args(argv)
    except UserError as error:
        return CommandLine(problems=list(error.problems))
    line = CommandLine(
        config_file=found.config_file, output_config=found.output_config, print_config=found.print_config
    )
    if line.config_file is _NO_VALUE:
        line.config_file = None
        line.problems.append(Problem("config_file needs a value", COMMAND_LINE, "name a TOML file after --config_file"))
    for name, option in run.options().items():
        value = getattr(found, name, None)
        if value is _NO_VALUE:
            line.problems.append(
                Problem(
                    f"--{name} needs a value",
                    COMMAND_LINE,
                    f"write it behind the flag; a value that starts with a dash is written --{name}=VALUE",
                )
            )
        elif value is not None:
            line.values[name] = _from_text(option, value)
    _judge_rest(line, run, rest)
    return line


def _from_text(option: Option, value: Any) -> Any:
    """The typed value of a text; a text that does not fit stays a text, for the validation to refuse."""
    if isinstance(value, list):
        return [_from_text(option, item) for item in value]
    if option.kind in ("int", "float") and isinstance(value, str):
        for convert in (int, float):
            try:
                return convert(value)
            except ValueError:
                continue
    return value


def _judge_rest(line: CommandLine, run: Run, rest: Sequence[str]) -> None:
    """Flags that this run does not have; the words after such a flag are its values."""
    position = 0
    while position < len(rest):
        word = rest[position]
        position += 1
        if not word.startswith("--"):
            line.problems.append(Problem(f"{word!r} belongs to no flag", COMMAND_LINE, "put quotes around texts"))
            continue
        name, sign, text = word.removeprefix("--").partition("=")
        words = [text] if sign else []
        while position < len(rest) and not rest[position].startswith("--"):
            words.append(rest[position])
            position += 1
        notice = notice_without_effect(name, run.name)
        if notice:
            line.notices.append(notice)
            continue
        value: Any = True if not words else words[0] if len(words) == 1 else words
        problem = foreign_flag(name, value, run=run.name, where=COMMAND_LINE)
        if problem:
            line.problems.append(Problem(f"--{problem.what}", problem.where, problem.fix))


def build_parser(run: Run) -> argparse.ArgumentParser:
    """The parser of a run. Options that this run only shares with a TOML file are listed by name."""
    parser = _Parser(
        prog=run.script,
        description=run.purpose,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        argument_default=None,
        epilog="Every option is also a TOML key. Booleans that a TOML file sets are switched off with --no_NAME.",
    )
    files = parser.add_argument_group("configuration files")
    files.add_argument(
        "--config_file", nargs="?", const=_NO_VALUE, metavar="FILE",
        help="TOML file with options; sections are ignored, the command line wins",
    )  # fmt: skip
    files.add_argument(
        "--output_config", action="store_true", help="write the options given here to config_file, then exit"
    )
    files.add_argument(
        "--print_config", action="store_true", help="print the effective options and where they come from, then exit"
    )
    if run.name == "sdxl_train_network":  # done by the entry point, before any option is read
        files.add_argument(
            "--config_from_lora", nargs="?", metavar="FILE", default=argparse.SUPPRESS,
            help="rebuild the options of the run that trained this network, from its metadata: print them, or write "
            "them to config_file and a dataset file beside it, then exit",
        )  # fmt: skip
    shared: list[str] = []
    for group in run.groups.values():
        shared += _add_group(parser, group, run)
    if shared:
        names = textwrap.fill(", ".join(shared), width=100)
        parser.add_argument_group("accepted without effect", f"so that one TOML file serves several scripts:\n{names}")
    return parser


def _add_group(parser: argparse.ArgumentParser, group: type[Group], run: Run) -> list[str]:
    """Add the options of a group; returns the names of those that do nothing in this run."""
    target = parser.add_argument_group(group.title)
    idle = []
    for option in group.options().values():
        acts = run.name in option.acts
        _add_option(target, option, help_text=_help(option) if acts else argparse.SUPPRESS)
        if not acts:
            idle.append(option.name)
    return idle


def _add_option(target: argparse._ArgumentGroup, option: Option, *, help_text: str) -> None:
    flags = [f"--{name}" for name in (option.name, *option.aliases)]
    if option.kind == "bool":
        target.add_argument(
            *flags, f"--{option.negation}", dest=option.name, action=_Switch, off=f"--{option.negation}", help=help_text
        )
        return
    metavar = "PATH" if option.is_path else _METAVARS[option.kind]
    if option.many:
        target.add_argument(*flags, dest=option.name, nargs="*", metavar=metavar, help=help_text)
    else:
        target.add_argument(*flags, dest=option.name, nargs="?", const=_NO_VALUE, metavar=metavar, help=help_text)


def _help(option: Option) -> str:
    parts = [option.help]
    if option.choices:
        parts.append(f"one of: {', '.join(option.choices)}")
    if option.default not in (None, (), "") and option.kind != "bool":
        parts.append(f"default: {option.default if option.kind == 'str' else toml_value(option.default)}")
    if option.default is True:
        parts.append("on by default")
    return "; ".join(parts).replace("%", "%%")


class _Switch(argparse.Action):
    """A boolean flag and the flag that switches it off."""

    def __init__(self, option_strings: Sequence[str], dest: str, off: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)
        self._off = off

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string != self._off)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Flags in one column, no "FLAG FLAG" repetition, no usage line of two hundred flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=min(120, int(os.environ.get("COLUMNS", "110"))))

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        super().add_usage("%(prog)s [--config_file run.toml] [--option value ...]", [], [], prefix)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if name != getattr(action, "_off", None)]
        value = "" if action.nargs == 0 else f" {action.metavar}{' ...' if action.nargs == '*' else ''}"
        return ", ".join(names) + value


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that this problem is reported with all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"the command line cannot be read: {message}", where=COMMAND_LINE)

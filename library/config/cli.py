"""From argv and a TOML file to a validated `RunConfig`: the command line beats the file, the file beats the default."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from library.config import check_files, notices
from library.config.command_line import COMMAND_LINE, CommandLine, read_command_line
from library.config.dataset_file import read_datasets
from library.config.dataset_keys import resolution_key
from library.config.effective import print_config, write_config
from library.config.implied import apply_implied
from library.config.known_flags import foreign_flag, nearest, notice_without_effect
from library.config.run_config import RunConfig
from library.config.runs import RUNS, Run
from library.config.toml_file import read_toml
from library.config.validate import check_rules
from library.config.values import Given, build_config
from library.errors import Problem, UserError

Check = Callable[[RunConfig], list[Problem]]


def parse(run: str, argv: Sequence[str] | None = None, *, checks: Sequence[Check] = ()) -> RunConfig:
    """Read the options of entry point `run` (a key of `RUNS`) from `argv` (default: sys.argv[1:]).

    `checks` are rules of other packages (of a network module, say) whose problems are reported with all others.
    Raises UserError with all problems at once. `--help`, `--print_config` and `--output_config` end with SystemExit(0).
    """
    entry = RUNS[run]
    line = read_command_line(entry, argv)
    problems = list(line.problems)
    given: dict[str, Given] = {}
    messages = list(line.notices)
    if line.output_config:
        _write_and_exit(entry, line)
    if line.config_file:
        try:
            file = read_toml(config_path(line.config_file), what="config_file")
        except UserError as error:  # without the file, whatever else is missing says nothing
            raise UserError.from_problems([*problems, *error.problems]) from error
        given, found, told = _sort(entry, file.flat())
        problems += found
        messages += told
    given |= {name: Given(value, COMMAND_LINE) for name, value in line.values.items()}
    messages += [
        f"{name} has no effect in {entry.script}" for name in line.values if run not in entry.options()[name].acts
    ]
    cfg = _finish(entry, given, problems=problems, messages=messages, checks=checks)
    if line.print_config:
        print_config(cfg)
        raise SystemExit(0)
    return cfg


def make_config(run: str, **flat: Any) -> RunConfig:
    """The configuration of entry point `run` from values by option name, validated like a command line."""
    entry = RUNS[run]
    items = ((name, value, "argument") for name, value in flat.items() if value is not None)
    given, problems, messages = _sort(entry, items)
    return _finish(entry, given, problems=problems, messages=messages)


def config_path(name: str) -> Path:
    """The path of a configuration file; ".toml" is added when it is missing. Raises UserError for a missing file."""
    path = Path(name).expanduser()
    if path.suffix != ".toml":
        path = path.with_name(path.name + ".toml")
    if not path.is_file():
        near = nearest(path.name, [other.name for other in path.parent.glob("*.toml")])
        fix = f"did you mean {path.with_name(near)}?" if near else "name an existing TOML file"
        raise UserError(f"config_file {path} does not exist", where=COMMAND_LINE, fix=fix)
    return path


def _sort(run: Run, items: Iterable[tuple[str, Any, str]]) -> tuple[dict[str, Given], list[Problem], list[str]]:
    """Values by option name, problems with names, and notices, from (name, value, place).

    Of a name that is given several times, in several sections of a file, the last value counts.
    """
    options = run.options()
    aliases = {alias: name for name, option in options.items() for alias in option.aliases}
    given: dict[str, Given] = {}
    problems: list[Problem] = []
    messages: list[str] = []
    for key, value, where in items:
        name = resolution_key(aliases.get(key, key), value)
        if name in options:
            if name in given and given[name].value != value:
                messages.append(f"{key} is set in {given[name].where} and in {where}; the latter counts")
            given[name] = Given(value, where)
            continue
        notice = notice_without_effect(name, run.name)
        problem = None if notice else foreign_flag(name, value, run=run.name, where=where)
        messages += [notice] if notice else []
        problems += [problem] if problem else []
    return given, problems, messages


def _finish(
    run: Run, given: dict[str, Given], *, problems: list[Problem], messages: list[str], checks: Sequence[Check] = ()
) -> RunConfig:
    """Validate types, then everything that needs several values or the disk; raise all problems together."""
    cfg, wrong = build_config(run, given)
    cfg = apply_implied(cfg)
    found = [*problems, *(problem for each in wrong.values() for problem in each)]
    found += check_rules(cfg, wrong=wrong)
    found += check_files.check_files(cfg, wrong=wrong)
    if "data" in cfg.groups:
        _, data_problems, data_notices = read_datasets(cfg, wrong=wrong)
        found += data_problems
        messages = [*messages, *data_notices]
    found += [problem for check in checks for problem in check(cfg)]
    if found:
        raise UserError.from_problems(found)
    cfg.notices[:0] = messages
    cfg.notices.extend(notices.notices(cfg))
    return cfg


def _write_and_exit(run: Run, line: CommandLine) -> None:
    """--output_config: write the options of the command line to config_file; types and names are checked before."""
    problems = list(line.problems)
    if not line.config_file:
        problems.append(Problem("output_config needs config_file", COMMAND_LINE, "name the file to write"))
    given = {name: Given(value, COMMAND_LINE) for name, value in line.values.items()}
    cfg, wrong = build_config(run, given)
    problems += [problem for each in wrong.values() for problem in each]
    if problems:
        raise UserError.from_problems(problems)
    assert line.config_file is not None
    print(f"written: {write_config(cfg, line.config_file)}")
    raise SystemExit(0)

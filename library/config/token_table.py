"""The new tokens of a run, from the options or from a TOML table, and the sentences they are trained with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.fields import TOKENS
from library.config.run_config import RunConfig
from library.config.toml_file import TomlFile, read_text, read_toml
from library.errors import Problem, UserError

EMBEDDING_SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")
PLACE = "{}"  # where a template has the token
_TEMPLATES = Path(__file__).parent / "token_templates"
# What captions, prompts and file names already use for something else.
_TAKEN = re.compile(r"[\s,()\[\]{}|:;/\\\"*?]")
_KEYS = {"init_word": str, "weights": str, "num_vectors_per_token": int}


@dataclass(frozen=True)
class TokenSpec:
    """A new word. num_vectors: per text encoder; None: as many as `weights` has, else 1. where: for messages."""

    name: str
    num_vectors: int | None = None
    init_word: str | None = None
    weights: str | None = None
    where: str = ""

    @property
    def init_file(self) -> str | None:
        """The embedding file that `init_word` names, if it does."""
        return self.init_word if self.init_word and self.init_word.lower().endswith(EMBEDDING_SUFFIXES) else None


def trains_tokens(cfg: RunConfig) -> bool:
    """Whether the run has new tokens."""
    return cfg.run in TOKENS or ("pivotal" in cfg.groups and cfg.pivotal.train_tokens)


def token_specs(cfg: RunConfig) -> list[TokenSpec]:
    """The tokens of a run. Raises UserError for a table or names that cannot be used; files are not opened."""
    options = cfg.tokens
    if options.token_file:
        file = read_toml(Path(options.token_file), what="token_file")
        specs = list(_table(file))
    elif options.token_string is not None:
        count = options.num_vectors_per_token if cfg.is_given("num_vectors_per_token") or not options.weights else None
        where = f"token_string ({cfg.provenance['token_string']})"
        specs = [TokenSpec(options.token_string, count, options.init_word, options.weights, where)]
    else:
        specs = []
    problems = [problem for spec in specs for problem in _problems(spec)]
    lowered = [spec.name.lower() for spec in specs]
    problems += [
        Problem(f"the token {spec.name} is there twice; capital letters make no difference", spec.where, "rename one")
        for index, spec in enumerate(specs)
        if spec.name.lower() in lowered[:index]
    ]
    if problems:
        raise UserError.from_problems(problems)
    return specs


def _table(file: TomlFile) -> Iterator[TokenSpec]:
    tokens = file.data.get("tokens")
    if set(file.data) != {"tokens"} or not isinstance(tokens, dict) or not tokens:
        raise UserError("token_file holds no tokens", file.name, "write a table [tokens.NAME] for each token")
    for name, entry in tokens.items():
        where = file.where("tokens", name)
        if not isinstance(entry, dict):
            raise UserError(f"tokens.{name} is not a table", where, f"write [tokens.{name}] and its keys below it")
        for key, value in entry.items():
            _check_key(key, value, where=file.where("tokens", name, key))
        yield TokenSpec(
            name, entry.get("num_vectors_per_token"), entry.get("init_word"), entry.get("weights"), where=where
        )


def _check_key(key: str, value: Any, *, where: str) -> None:
    if key not in _KEYS:
        raise UserError(f"{key} is not a key of a token", where, f"the keys are {', '.join(_KEYS)}")
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    wanted = "a text" if _KEYS[key] is str else "a whole number from 1 on"
    if not (isinstance(value, str) if _KEYS[key] is str else is_number):
        raise UserError(f"{key} is {value!r}, not {wanted}", where)


def _problems(spec: TokenSpec) -> Iterator[Problem]:
    taken = _TAKEN.search(spec.name)
    if not spec.name or taken:
        what = f"the token {spec.name!r} has {taken[0]!r} in it" if taken else "the token is empty"
        yield Problem(
            f"{what}, which captions, prompts or file names use otherwise",
            spec.where,
            "use letters, digits, -, _, <, >",
        )
    if spec.weights and spec.init_word:
        what = f"the token {spec.name} starts from weights and from init_word"
        yield Problem(what, spec.where, "leave one of them out")
    for option, name in (("weights", spec.weights), ("init_word", spec.init_file)):
        if name and not Path(name).is_file():
            fix = "name an embedding file" + (", or words" if option == "init_word" else "")
            yield Problem(f"{option} {name} does not exist", spec.where, fix)


def template_file(cfg: RunConfig) -> Path | None:
    """The file of the sentences that take the place of the captions; None: the captions are used."""
    options = cfg.tokens
    if options.token_template_file:
        return Path(options.token_template_file)
    if options.use_object_template:
        return _TEMPLATES / "object.txt"
    return _TEMPLATES / "style.txt" if options.use_style_template else None


def read_templates(path: Path) -> tuple[str, ...]:
    """The sentences of a template file; # starts a comment line. Raises UserError for one that lacks {}."""
    lines = [(n, line.strip()) for n, line in enumerate(read_text(path, what="the template file").splitlines(), 1)]
    kept = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not kept:
        raise UserError("the template file holds no sentence", str(path), "write one a line, with {} for the token")
    for number, line in kept:
        if PLACE not in line:
            raise UserError(f'"{line}" has no {{}}', f"{path} line {number}", "write {} where the token belongs")
    return tuple(line for _, line in kept)

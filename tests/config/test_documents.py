"""Help texts and generated files follow the options."""

import contextlib
import io
import os

import pytest

from library.config.choices import ROOT
from library.config.cli import parse
from library.config.fields import EVERY_RUN
from library.config.recipes import RECIPES
from library.config.render import documents, main
from library.config.runs import RUNS
from library.errors import UserError

OPTIONS = [option for run in RUNS.values() for option in run.options().values()]


def _help(run: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        parse(run, ["--help"])
    assert ended.value.code == 0
    return out.getvalue()


@pytest.mark.parametrize("path", sorted(documents()), ids=lambda path: path.name)
def test_generated_file_is_up_to_date(path):
    assert path.read_text(encoding="utf-8") == documents()[path], "run: python -m library.config.render"


def test_check_finds_a_stale_file(monkeypatch, tmp_path, capsys):
    page = ROOT / "docs" / "no_such_page.md"
    monkeypatch.setattr("library.config.render.documents", lambda: {page: "text"})
    assert main(["--check"]) == 1
    assert "stale: docs" in capsys.readouterr().out
    assert not page.exists()
    monkeypatch.setattr("library.config.render.documents", dict)
    assert main(["--check"]) == 0


@pytest.mark.parametrize("run", RUNS)
def test_help_names_every_option_with_choices_and_default(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100000")
    text = _help(run)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((100, 20)))
    for name, option in RUNS[run].options().items():
        if run in option.acts:
            assert f"--{name}" in text
        else:
            assert name in text.split("accepted without effect")[1]
    if run == "sdxl_train_network":
        assert "accepted without effect" not in text
        assert "default: 2e-06" in text


def test_options_are_described_and_act_somewhere():
    for option in OPTIONS:
        assert option.help, option.name
        assert option.acts and option.acts <= EVERY_RUN, option.name
        assert all(option.name in RUNS[run].options() for run in option.acts), option.name


@pytest.mark.parametrize("run", RUNS.values(), ids=lambda run: run.name)
def test_switching_off_never_meets_another_option(run):
    names = set(run.options())
    negations = [option.negation for option in run.options().values() if option.kind == "bool"]
    assert not names & set(negations)
    assert len(set(negations)) == len(negations)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_a_valid_configuration(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        parse(RECIPES[name].run, ["--config_file", f"docs/recipes/{name}.toml"])
    except UserError as error:  # the user's own files are not in this repository
        left = [problem.what for problem in error.problems if not problem.what.endswith("does not exist")]
        assert left == []
        assert name != "lora_tiny"

"""tools/quickstart.py: standard library only, one installation per set of pins, and failures that say what to type."""

import ast
import json
import sys

import pytest

from tests.arch import tree
from tools import quickstart


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder with requirement files and no .venv; commands are recorded instead of run."""
    monkeypatch.delenv("SDXL_SUITE_PYTHON", raising=False)
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(quickstart, "STAMP", tmp_path / ".venv" / "quickstart.json")
    monkeypatch.setattr(quickstart, "has_pip", lambda python: python.exists())
    (tmp_path / "requirements.txt").write_text("torch==1\n", encoding="utf-8")
    (tmp_path / "requirements-dev.txt").write_text("pytest==1\n", encoding="utf-8")
    commands = []

    def record(step, command, extra_env=None):
        commands.append(step)
        if "venv" in map(str, command):
            quickstart.venv_python().parent.mkdir(parents=True, exist_ok=True)
            quickstart.venv_python().touch()

    monkeypatch.setattr(quickstart, "run", record)
    return commands


def test_it_needs_nothing_but_the_standard_library():
    assert tree.third_party("tools/quickstart.py") == set()
    assert not any(tree.is_ours(found.module) for found in tree.imports_of("tools/quickstart.py"))


def test_an_old_python_can_read_it_and_is_told_what_is_needed():
    ast.parse((tree.ROOT / "tools/quickstart.py").read_text(encoding="utf-8"), feature_version=(3, 7))
    with pytest.raises(quickstart.Failure, match=r"Python 3\.11 or newer is needed; this is 3\.9"):
        quickstart.require_python((3, 9, 18))


def test_the_second_call_installs_nothing(house):
    quickstart.environment(development=True)
    assert [step.split()[0] for step in house] == ["make", "install"]
    quickstart.environment(development=True)
    quickstart.environment(development=False)
    assert len(house) == 2


def test_the_demo_leaves_out_what_only_tests_need(house):
    quickstart.environment(development=False)
    assert house[-1] == "install requirements.txt"
    quickstart.environment(development=True)
    assert house[-1] == "install requirements.txt and requirements-dev.txt"


def test_changed_pins_are_installed_into_the_same_environment(house, tmp_path):
    quickstart.environment(development=False)
    (tmp_path / "requirements.txt").write_text("torch==2\n", encoding="utf-8")
    quickstart.environment(development=False)
    assert [step.split()[0] for step in house] == ["make", "install", "install"]


def test_another_python_gets_a_new_environment(house):
    quickstart.environment(development=False)
    stamp = quickstart.read_stamp() | {"python": "3.10.0"}
    quickstart.STAMP.write_text(json.dumps(stamp), encoding="utf-8")
    quickstart.environment(development=False)
    assert [step.split()[0] for step in house] == ["make", "install", "make", "install"]


def test_an_interrupted_installation_is_done_again(house, monkeypatch):
    quickstart.environment(development=False)
    record = quickstart.run

    def fail(step, command, extra_env=None):
        raise quickstart.Failure("no network")

    monkeypatch.setattr(quickstart, "run", fail)
    with pytest.raises(quickstart.Failure):
        quickstart.environment(development=True)
    monkeypatch.setattr(quickstart, "run", record)
    quickstart.environment(development=False)
    assert house[-1] == "install requirements.txt"
    assert len(house) == 3


def test_an_interpreter_can_be_given(house, monkeypatch):
    monkeypatch.setenv("SDXL_SUITE_PYTHON", "some-python")
    assert quickstart.environment(development=True) == "some-python"
    assert house == []


def test_a_failure_names_the_step_its_exit_code_and_the_command(capfd):
    command = [sys.executable, "-c", "import sys; sys.exit(7)"]
    with pytest.raises(quickstart.Failure) as caught:
        quickstart.run("the seventh step", command)
    assert caught.value.code == 7
    assert "the seventh step" in str(caught.value)
    assert quickstart.shown(command) in str(caught.value)


def test_make_and_quickstart_have_the_same_verbs():
    makefile = (tree.ROOT / "Makefile").read_text(encoding="utf-8")
    line = next(line for line in makefile.splitlines() if line.startswith(".PHONY:"))
    assert set(line.split()[1:]) == set(quickstart.VERBS)


def test_every_demo_step_starts_a_file_of_the_repository():
    for step, command in quickstart.demo_steps("python"):
        scripts = [word for word in command if word.endswith(".py")]
        assert len(scripts) == 1, step
        assert scripts[0] in tree.tracked_files(), step


def test_every_benchmark_of_make_bench_is_there():
    assert {f"benchmarks/{name}.py" for name in quickstart.BENCHMARKS} <= set(tree.tracked_files())

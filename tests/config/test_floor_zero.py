"""Errors, seeds, sizes, plugins and logging."""

import logging
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config.choices import ROOT
from library.errors import Problem, UserError, entry_point
from library.log import get_logger, setup_logging
from library.plugins import list_plugins, load_plugin
from library.seeds import derive_seed
from library.sizes import Size, parse_resolution

PARTS = st.lists(st.one_of(st.integers(), st.text("ab1", max_size=4)), max_size=4)


def test_seed_is_the_same_on_every_machine():
    assert derive_seed(42, "noise", 1, "a.png", 0) == 2787458185765000085
    assert derive_seed() == derive_seed()


@given(PARTS, PARTS)
def test_seeds_of_different_purposes_differ(first, second):
    assert 0 <= derive_seed(*first) < 2**63
    assert (derive_seed(*first) == derive_seed(*second)) == (
        [(type(part), part) for part in first] == [(type(part), part) for part in second]
    )


def test_seed_refuses_floats():
    with pytest.raises(TypeError):
        derive_seed(1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("512", (512, 512)),
        ("512,768", (512, 768)),
        (512, (512, 512)),
        ((512, 768), (512, 768)),
        ("512 x 768", (512, 768)),
    ],
)
def test_resolution_is_read(value, size):
    assert parse_resolution(value) == Size(*size)


@pytest.mark.parametrize("value", ["", "a", "1,2,3", 0, (1, 2, 3), 1.5, True, "512,", None, (512, "a")])
def test_wrong_resolution_is_refused(value):
    with pytest.raises(ValueError, match=r"resolution|below"):
        parse_resolution(value)


def test_size_knows_area_and_aspect():
    assert (Size(512, 256).area, Size(512, 256).aspect, str(Size(512, 256))) == (131072, 2.0, "512x256")


def test_error_survives_pickle_with_all_problems():
    error = UserError.from_problems([Problem("a", "b", "c"), Problem("d")])
    assert pickle.loads(pickle.dumps(error)).problems == error.problems


def test_entry_point_prints_every_problem_and_returns_two(capsys):
    @entry_point
    def main(argv=None):
        raise UserError.from_problems([Problem("this is wrong", "run.toml line 3", "do that"), Problem("and this")])

    assert main([]) == 2
    printed = capsys.readouterr().err
    assert printed.splitlines() == [
        "2 problems:", "1. this is wrong", "  where: run.toml line 3", "  fix: do that", "2. and this",
    ]  # fmt: skip


def test_entry_point_passes_results_and_defects_on():
    def defect(argv=None):
        raise ZeroDivisionError

    def interrupted(argv=None):
        raise KeyboardInterrupt

    assert entry_point(lambda argv=None: None)() == 0
    assert entry_point(lambda argv=None: 3)() == 3
    assert entry_point(interrupted)() == 130
    with pytest.raises(ZeroDivisionError):
        entry_point(defect)()


def test_other_ranks_repeat_only_the_first_sentence(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")

    @entry_point
    def main(argv=None):
        raise UserError.from_problems([Problem("first"), Problem("second")])

    assert main() == 2
    assert capsys.readouterr().err == "[rank 1] error: first\n"


def test_plugins_are_listed_without_private_files(tmp_path):
    for name in ("b.py", "a.py", "_shared.py", "__init__.py", "notes.txt"):
        (tmp_path / name).write_text("raise RuntimeError('imported')")
    assert list_plugins(tmp_path) == ["a", "b"]
    assert list_plugins(tmp_path / "missing") == []


def test_plugin_is_loaded_by_name_or_path(tmp_path, monkeypatch):
    package = "plugins_of_this_test"
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "square.py").write_text("answer = 4")
    (folder / "broken.py").write_text("import not_a_package_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_plugin(package, "square").answer == 4
    assert load_plugin("library.config", f"{package}.square").answer == 4
    with pytest.raises(UserError, match="did you mean square"):
        load_plugin(package, "sqare")
    with pytest.raises(UserError, match="cannot be imported"):
        load_plugin(package, "no_such_module.at_all")
    with pytest.raises(ModuleNotFoundError):  # the user's own defect keeps its traceback
        load_plugin(package, f"{package}.broken")


@pytest.fixture
def clean_logging():
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def test_log_speaks_on_rank_zero_only(capsys, monkeypatch, clean_logging):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        setup_logging()
        get_logger("a").info("progress")
        get_logger("a").warning("trouble")
    assert capsys.readouterr().err.splitlines() == ["progress", "warning: trouble", "[rank 1] warning: trouble"]


def test_log_goes_to_a_file_with_time_and_level(tmp_path, capsys, clean_logging):
    file = tmp_path / "logs" / "run.log"
    setup_logging("DEBUG", file=str(file), simple=False)
    get_logger("a").debug("detail")
    assert capsys.readouterr().err == ""
    assert file.read_text().split()[1:] == ["DEBUG", "detail"]


def test_configuration_leaves_torch_and_numpy_alone():
    code = (
        "import sys, contextlib, io; from library.config.cli import parse\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    parse('sdxl_train_network', ['--help'])\n"
        "print([name for name in ('torch', 'numpy', 'diffusers', 'transformers', 'PIL') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""What options name, and one way to see whether an option acts."""

import pytest

from library.errors import UserError
from tests.e2e.options.cases import CASES, filled
from tests.e2e.options.observing import furnish, observe, options_of


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """A folder with everything that an option may name."""
    folder = tmp_path_factory.mktemp("options")
    furnish(folder)
    return folder


@pytest.fixture(scope="session")
def shared():
    """Runs without the option in question, by what was set beside it: many cases compare with the same one."""
    return {}


@pytest.fixture
def acts_or_is_refused(places, shared, monkeypatch, tmp_path):
    """check(run, name): with the case's value the run shows something else than without it, or refuses it by name."""

    def seen(run, out, options):
        known = {key: value for key, value in options.items() if key in options_of(run)}
        filled_in = {key: filled(value, folder=places, run=run, out=out) for key, value in known.items()}
        return observe(run, places, monkeypatch, out, filled_in)

    def check(run, name):
        if not (places / f"first-{run}").exists():
            seen(run, f"first-{run}", {"save_state": True})
        case = CASES[name]
        try:
            with_option = case.look(seen(run, f"{tmp_path.name}-with", {**case.beside, name: case.value}))
        except UserError as error:
            told = [f"{problem.what} {problem.where}" for problem in error.problems]
            assert any(name in text for text in told), told
            return
        key = f"{run} {sorted(case.beside.items())}"
        if key not in shared or "{out}" in key:
            try:
                shared[key] = seen(run, f"{tmp_path.name}-without", case.beside)
            except UserError:
                return  # the option is what makes the rest possible
        assert with_option != case.look(shared[key]), f"{name} = {case.value!r} changes nothing in {run}"

    return check

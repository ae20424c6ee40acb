"""Every option of a training script is set once: the run shows it, or the option is refused by name."""

import pytest

from library.errors import UserError
from tests.e2e.options.cases import CASES, ELSEWHERE, Case, filled
from tests.e2e.options.observing import furnish, observe, options_of

RUNS = ("sdxl_train_network", "sdxl_train")
SETTINGS = [(run, name) for run in RUNS for name in options_of(run) if name not in ELSEWHERE]


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """What options name, and one finished run of each script with its state."""
    folder = tmp_path_factory.mktemp("options")
    furnish(folder)
    with pytest.MonkeyPatch.context() as patch:
        for run in RUNS:
            observe(run, folder, patch, f"first-{run}", {"save_state": True})
    return folder


@pytest.mark.e2e
@pytest.mark.parametrize(("run", "name"), SETTINGS, ids=[f"{run}-{name}" for run, name in SETTINGS])
def test_option_acts_or_is_refused(places, monkeypatch, tmp_path, run, name):
    case = CASES[name]

    def seen(out, **changes):
        known = {key: value for key, value in {**case.beside, **changes}.items() if key in options_of(run)}
        place = f"{tmp_path.name}-{out}"
        options = {key: filled(value, folder=places, run=run, out=place) for key, value in known.items()}
        return case.look(observe(run, places, monkeypatch, place, options))

    try:
        with_option = seen("with", **{name: case.value})
    except UserError as error:
        told = [f"{problem.what} {problem.where}" for problem in error.problems]
        assert any(name in text for text in told), told
        return
    try:
        without = seen("without")
    except UserError:
        return  # the option is what makes the rest possible
    assert with_option != without, f"{name} = {case.value!r} changes nothing in {run}"


def test_every_option_has_a_case():
    named = {name for run in RUNS for name in options_of(run)}
    assert named == set(CASES) | set(ELSEWHERE)
    assert not set(CASES) & set(ELSEWHERE)
    assert all(isinstance(case, Case) for case in CASES.values())

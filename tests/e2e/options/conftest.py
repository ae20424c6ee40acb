"""What options name, and one way to see whether an option acts."""

import shutil

import pytest

from library.errors import UserError
from tests.e2e.options.cases import LEVELS, ON_DISK, cases_of, filled, may_be_refused
from tests.e2e.options.observing import furnish, observe, options_of, tidy
from tests.e2e.options.serving import observe_batches


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
    """check(run, name): with the case's value the run shows something else than without it, or refuses it by name.

    What does not show in the batches of a run or in a rehearsal, where the steps see sums in the place of a model, must
    show in a whole run. Only options that `may_be_refused` may be.
    """

    def seen(run, out, options, level="whole"):
        known = {key: value for key, value in options.items() if key in options_of(run)}
        filled_in = {key: filled(value, folder=places, run=run, out=out) for key, value in known.items()}
        try:
            if level == "batches":
                return observe_batches(run, places, monkeypatch, out, filled_in)
            return observe(run, places, monkeypatch, out, filled_in, rehearsed=level == "rehearsal")
        finally:
            tidy(places)
            if "{run}/cache" in str(options.get("cache_dir")):
                as_it_was(places / f"first-{run}" / "cache")

    def as_it_was(cache):
        """A run may fill a cache anew, and the next one would find it filled."""
        kept = cache.with_name("cache-kept")
        if kept.exists():
            shutil.rmtree(cache)
            shutil.copytree(kept, cache)
        else:
            shutil.copytree(cache, kept)

    def once(key, *arguments):
        if key not in shared:
            shared[key] = seen(*arguments)
        return shared[key]

    def shows(run, name, case, level):
        kind = f"{tmp_path.name}-{level}"
        if case.together:
            members = {other: more.value for other, more in cases_of(run).items() if more.together == case.together}
            with_option = once(f"{run} {case.together} {level}", run, f"{kind}-together", members, level)
        else:
            with_option = seen(run, f"{kind}-with", {**case.beside, name: case.value}, level)
        own_place = tmp_path.name if "{out}" in str(case.beside) else ""
        try:
            key = f"{run} {sorted(case.beside.items())} {level} {own_place}"
            without = once(key, run, f"{kind}-without", case.beside, level)
        except UserError:
            return True  # the option is what makes the rest possible
        return case.look(with_option) != case.look(without)

    def check(run, name, case=None):
        if not (places / f"first-{run}").exists():
            seen(run, f"first-{run}", {"save_state": True, **ON_DISK, "cache_dir": "{folder}/{run}/cache"})
        case = case or cases_of(run)[name]
        try:
            acts = any(shows(run, name, case, level) for level in LEVELS[LEVELS.index(case.level) :])
        except UserError as error:
            told = [f"{problem.what} {problem.where}" for problem in error.problems]
            assert may_be_refused(run, name) and any(name in text for text in told), told
            return
        assert acts, f"{name} = {case.value!r} changes nothing in {run}"

    return check

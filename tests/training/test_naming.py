"""Names and keep rules of checkpoints."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from library.training import naming


def test_names_are_those_of_sd_scripts():
    names = naming.Names(Path("out"), "cat")
    assert names.model(names.epoch_stem(3)) == Path("out/cat-000003.safetensors")
    assert names.model(names.step_stem(40)) == Path("out/cat-step00000040.safetensors")
    assert names.state(names.epoch_stem(3)) == Path("out/cat-000003-state")
    assert names.state(names.last_stem()) == Path("out/cat-state")
    nameless = naming.Names(Path("out"), None)
    assert nameless.epoch_stem(1) == "epoch-000001"
    assert nameless.step_stem(1) == "at-step00000001"
    assert nameless.last_stem() == "last"


def test_the_last_epoch_is_only_saved_as_the_final_file():
    assert [e for e in range(1, 7) if naming.epoch_is_saved(e, 2, 6)] == [2, 4]
    assert not naming.epoch_is_saved(3, None, 6)


def _kept(period: int, keep: int, last: int, to_remove) -> list[int]:
    files = set()
    for moment in range(period, last + 1, period):
        files.add(moment)
        files.discard(to_remove(moment, period, keep))
    return sorted(files)


def test_worked_example_of_the_keep_rule_for_steps():
    assert _kept(10, 30, 50, naming.step_to_remove) == [20, 30, 40, 50]


def test_keep_rule_for_epochs_keeps_that_many():
    assert _kept(2, 3, 20, naming.epoch_to_remove) == [16, 18, 20]
    assert naming.epoch_to_remove(10, 2, None) is None


@given(period=st.integers(1, 20), keep=st.integers(1, 100), saves=st.integers(1, 40))
def test_step_files_that_stay_are_exactly_those_of_the_last_keep_steps(period, keep, saves):
    last = period * saves
    kept = _kept(period, keep, last, naming.step_to_remove)
    expected = [s for s in range(period, last + 1, period) if s > last - keep - 1 - (last - keep - 1) % period]
    assert kept == expected
    assert last in kept


def test_save_ratio_never_gives_zero():
    assert naming.save_period_from_ratio(10, 4) == 2
    assert naming.save_period_from_ratio(3, 5) == 1

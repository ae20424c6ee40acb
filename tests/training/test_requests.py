"""Files that ask something of a running training."""

import signal

import pytest

from library.training.hooks import Event, View
from library.training.metrics import Meters
from library.training.preview import is_due
from library.training.requests import NAMES, SAMPLE, SAVE, STOP, RequestFiles
from library.training.state import Progress
from library.training.stop_hooks import StopHook


@pytest.fixture
def view():
    return View(Progress(), 100, 1, Meters())


def _hook(folder, **settings):
    return StopHook(files=RequestFiles(folder, pause=0.0), **settings)


def test_a_request_is_answered_in_one_step_and_its_file_removed_after_it(tmp_path, view):
    hook = _hook(tmp_path)
    hook(Event.START, view)
    (tmp_path / SAVE).touch()
    (tmp_path / SAMPLE).touch()
    hook(Event.STEP, view)
    assert view.requested == {SAVE, SAMPLE} and (tmp_path / SAVE).exists(), "still there while it is being answered"
    assert is_due(Event.STEP, view, None) and not view.stop
    hook(Event.STEP, view)
    assert view.requested == frozenset() and list(tmp_path.iterdir()) == []
    hook(Event.END, view)


def test_pictures_without_prompts_are_refused_in_words(tmp_path, view, caplog):
    hook = _hook(tmp_path, has_prompts=False)
    hook(Event.START, view)
    (tmp_path / SAMPLE).touch()
    hook(Event.STEP, view)
    hook(Event.END, view)
    assert "nothing is drawn, because --sample_prompts is not given" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_stop_now_stops_like_a_signal(tmp_path, view):
    hook = _hook(tmp_path)
    hook(Event.START, view)
    (tmp_path / STOP).touch()
    view.progress.global_step = 7
    hook(Event.STEP, view)
    assert view.stop and view.stop_reason == "stopped by stop_now after step 7"
    hook(Event.END, view)
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_run_left_is_not_obeyed(tmp_path, view, caplog):
    (tmp_path / STOP).touch()
    hook = _hook(tmp_path)
    hook(Event.START, view)
    hook(Event.STEP, view)
    assert not view.stop and list(tmp_path.iterdir()) == [] and "stop_now of an earlier run" in caplog.text
    hook(Event.END, view)


def test_all_questions_cost_one_exchange_and_ranks_without_files_hear_the_answers(tmp_path, view):
    asked = []

    def agree(answers):
        asked.append(list(answers))
        return [False, *(name in (SAMPLE,) for name in NAMES)]

    hook = StopHook(agree)
    hook(Event.START, view)
    hook(Event.STEP, view)
    assert asked == [[False] * 4] and view.requested == {SAMPLE}
    hook(Event.END, view)


def test_a_signal_still_stops_and_handlers_are_put_back(view):
    before = signal.getsignal(signal.SIGTERM)
    hook = StopHook()
    hook(Event.START, view)
    signal.raise_signal(signal.SIGTERM)
    hook(Event.STEP, view)
    assert view.stop_reason.startswith("stopped by SIGTERM")
    hook(Event.END, view)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_folder_is_looked_at_once_a_second_at_most(tmp_path):
    at = [10.0]
    files = RequestFiles(tmp_path, now=lambda: at[0])
    assert files.poll() == frozenset()
    (tmp_path / SAVE).touch()
    at[0] += 0.9
    assert files.poll() == frozenset()
    at[0] += 0.2
    assert files.poll() == {SAVE}

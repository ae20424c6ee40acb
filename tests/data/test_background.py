"""Helper threads: order, bounds, errors, and nothing left running."""

import threading

import pytest

from library.data.background import Behind, ahead


def helpers():
    return [thread for thread in threading.enumerate() if thread.name in ("ahead", "behind")]


def test_items_come_in_order_and_only_so_many_are_made_ahead():
    made, taken = [], 0
    behind = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    for number in ahead(items(), waiting=2):
        assert number == taken
        taken += 1
        threading.Event().wait(0.01)
        behind.append(len(made) - taken)
    assert taken == 20 and max(behind) <= 3 and helpers() == []  # two waiting, one in the maker's hands


def test_an_error_ahead_is_raised_at_its_place():
    def items():
        yield 1
        raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="gone"):
        seen.extend(ahead(items()))
    assert helpers() == []


def test_a_consumer_that_stops_ends_the_maker():
    closed = threading.Event()

    def items():
        try:
            yield from range(1000)
        finally:
            closed.set()

    taking = ahead(items())
    assert next(taking) == 0
    taking.close()
    assert closed.is_set() and helpers() == []


def test_jobs_are_done_in_order_and_waiting_for_them_works():
    done = []
    with Behind(waiting=2) as behind:
        for number in range(10):
            behind.put(lambda number=number: done.append(number))
        behind.wait()
        assert done == list(range(10))
        behind.put(lambda: done.append(10))
    assert done == list(range(11)) and helpers() == []


def test_a_failed_job_stops_the_next_put_and_later_jobs():
    def full():
        raise OSError("disk full")

    done = []
    with pytest.raises(OSError, match="disk full"), Behind(waiting=4) as behind:
        behind.put(full)
        behind.put(lambda: done.append("after the failure"))
        with pytest.raises(OSError, match="disk full"):
            behind.wait()
        behind.put(lambda: done.append("never"))
    assert done == [] and helpers() == []


def test_an_error_of_the_caller_still_does_what_was_put():
    done = []
    with pytest.raises(KeyboardInterrupt), Behind(waiting=8) as behind:
        for number in range(5):
            behind.put(lambda number=number: done.append(number))
        raise KeyboardInterrupt
    assert done == list(range(5)) and helpers() == []

"""Where the time goes: waiting, pausing, training."""

import pytest

from library.training.clock import Clock, Throughput


class _Time:
    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at


def test_only_the_time_until_an_item_comes_is_waiting():
    now = _Time()
    clock = Clock(now)

    def slowly():
        for item in range(3):
            now.at += 2
            yield item
        now.at += 1

    for _ in clock.timed(slowly()):
        now.at += 10
    assert clock.waited == 3 * 2 + 1


def test_speed_leaves_pauses_out_and_says_the_share_of_waiting():
    now = _Time()
    clock = Clock(now)
    throughput = Throughput(clock, window=100)
    assert throughput.mark(0, 0) == (0.0, 0.0)
    now.at += 8
    clock.waited += 2
    with clock.pause():
        now.at += 1000
    assert throughput.mark(10, 40) == (5.0, 0.25)


def test_the_window_slides_over_steps():
    now = _Time()
    throughput = Throughput(Clock(now), window=100)
    speeds = []
    for step in range(0, 401, 20):
        speeds.append(throughput.mark(step, step).images_per_second)
        now.at += 20 if step < 200 else 10
    assert speeds[10] == pytest.approx(1.0), "the first half goes at 1 a second"
    assert speeds[-1] == pytest.approx(2.0), "of which nothing is left 100 steps later"
    assert speeds[12] == pytest.approx(100 / (60 + 20)), "60 steps of the first half, 40 of the second"


def test_marks_further_apart_than_the_window_still_give_a_speed():
    now = _Time()
    throughput = Throughput(Clock(now), window=100)
    for step in (0, 500, 1000):
        speed = throughput.mark(step, 2 * step)
        now.at += 100
    assert speed.images_per_second == pytest.approx(10.0)

"""Where the time of a run goes: steps, waiting for data, and pauses in which nothing is trained."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


@dataclass
class Clock:
    """Host times in seconds. waited: for the next batches. paused: in saving, sample pictures and validation."""

    now: Callable[[], float] = time.perf_counter
    waited: float = 0.0
    paused: float = 0.0

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; the time until each is there counts as waiting."""
        iterator = iter(items)
        while True:
            begin = self.now()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited += self.now() - begin
            yield item

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time in which no step is meant to run; it does not make training slower."""
        begin = self.now()
        try:
            yield
        finally:
            self.paused += self.now() - begin


class Speed(NamedTuple):
    """images_per_second, and the share of the training time that was spent in waiting for data, in [0, 1]."""

    images_per_second: float
    data_wait: float


class _Mark(NamedTuple):
    step: int
    samples: int
    active: float
    waited: float


@dataclass
class Throughput:
    """The speed over the last `window` optimizer steps, or since the last mark where marks lie further apart."""

    clock: Clock
    window: int = 100
    _marks: deque[_Mark] = field(default_factory=deque)

    def mark(self, step: int, samples: int) -> Speed:
        """Note how far the run is now; the speed since the window began (zeros for the first mark)."""
        here = _Mark(step, samples, self.clock.now() - self.clock.paused, self.clock.waited)
        while len(self._marks) > 1 and self._marks[1].step <= step - self.window:
            self._marks.popleft()
        self._marks.append(here)
        first = self._marks[0]
        seconds = here.active - first.active
        if seconds <= 0:
            return Speed(0.0, 0.0)
        return Speed((samples - first.samples) / seconds, min(1.0, (here.waited - first.waited) / seconds))

"""Work that another thread does while the next pictures are drawn: encoding and writing them. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

MOST_WAITING = 8  # pieces of work in memory; with more, the giver waits


class Saver:
    """Does pieces of work in the order in which they are given, one after the other, in one thread.

    What a piece raises is raised by a later `give`, or by `finish`; the other pieces are done all the same.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._waiting: deque[Future[None]] = deque()

    def give(self, work: Callable[[], None]) -> None:
        """Have a piece of work done; waits while too many are there."""
        while self._waiting and (len(self._waiting) >= MOST_WAITING or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work))

    def finish(self) -> None:
        """Wait until everything is done; raises the first error that nobody has seen yet."""
        waiting, self._waiting = self._waiting, deque()
        errors = [error for future in waiting if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

"""Work beside the main thread: items made ready ahead of it, and jobs done behind it. Both are bounded in memory."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")


def num_helpers() -> int:
    """Threads that read and decode files while something else computes: one per CPU core that this rank can have."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _End:
    pass


def ahead(items: Generator[T, None, None], *, waiting: int = 1) -> Generator[T, None, None]:
    """The items in their order, made in a thread of their own; `waiting` finished ones at most are kept ready.

    What `items` raises is raised here. When the consumer stops early, `items` is closed and the thread ends.
    """
    ready: queue.Queue[T | _Raised | _End] = queue.Queue(waiting)
    stopped = threading.Event()

    def offer(item: T | _Raised | _End) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    offer(item)
                    if stopped.is_set():
                        return
        except BaseException as error:  # it belongs to whoever takes the items
            offer(_Raised(error))
        else:
            offer(_End())

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            if isinstance(item, _Raised):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()


class Behind:
    """Does jobs one after the other in a thread of its own; `waiting` of them at most are queued, then `put` waits.

    The first error of a job ends the work: it is raised by the next `put`, or when the block is left; later jobs are
    left undone. When the block is left by another error, Ctrl-C included, what was put is still done.
    """

    def __init__(self, *, waiting: int) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="behind", daemon=True)

    def __enter__(self) -> Behind:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._jobs.put(None)
        self._thread.join()
        if error is None:
            self._complain()

    def put(self, job: Callable[[], None]) -> None:
        """Have a job done. Raises what an earlier one has raised."""
        self._complain()
        self._jobs.put(job)

    def wait(self) -> None:
        """Return when everything put so far is done. Raises what a job has raised."""
        self._jobs.join()
        self._complain()

    def _complain(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job()
            except BaseException as error:  # raised where the jobs come from
                self._error = error
            finally:
                self._jobs.task_done()

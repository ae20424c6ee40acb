"""The same small work on very many files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

CHUNK = 128
BLOCK = 64 * CHUNK
THREADS = min(16, 4 * (os.cpu_count() or 1))

_WAITING = 3.0
"""Seconds per second of computing, above which the time goes into waiting for the disk or the network."""


def in_chunks(work: Callable[[Sequence[str]], Result], names: Sequence[str]) -> Iterator[Result]:
    """What `work` makes of each chunk of `names`, in order.

    On a fast disk threads only get into each other's way, on a network drive they save most of the time. So the first
    chunk of every block is done alone and watched, and the rest of the block as that one suggests.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for start in range(0, len(names), BLOCK):
                block = names[start : start + BLOCK]
                chunks = [block[first : first + CHUNK] for first in range(0, len(block), CHUNK)]
                wall, computing = time.perf_counter(), time.thread_time()
                result = work(chunks[0])
                wall, computing = time.perf_counter() - wall, time.thread_time() - computing
                yield result
                yield from pool.map(work, chunks[1:]) if wall > _WAITING * computing else map(work, chunks[1:])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

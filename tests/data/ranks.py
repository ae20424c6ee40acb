"""Several ranks in one process: each runs in a thread, and `exchange` brings them together."""

import threading
from concurrent.futures import ThreadPoolExecutor

from library.data import caching, latent_caching, latent_filling, text_caching


class Ranks:
    """Replaces `exchange` in the cache passes while `run` runs one function per rank."""

    def __init__(self, world, monkeypatch):
        self.world = world
        self._rank = threading.local()
        self._barrier = threading.Barrier(world, timeout=30)
        self._brought = [None] * world
        for module in (caching, latent_caching, latent_filling, text_caching):
            monkeypatch.setattr(module, "exchange", self._exchange)

    def run(self, work):
        """The results of `work(rank)` of every rank, in order."""

        def one(rank):
            self._rank.value = rank
            return work(rank)

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(one, range(self.world)))

    def _exchange(self, mine):
        self._brought[self._rank.value] = mine
        self._barrier.wait()
        everything = list(self._brought)
        self._barrier.wait()
        return everything

"""kill -9 while two processes fill one packed cache: nothing is torn, and a rerun builds exactly what is missing."""

import random
import shutil
import time

import numpy as np
import torch

from library.data.assemble import assemble
from library.data.cache_places import CachePlace
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.data.packed_entries import FACTS
from library.io.packed_maintenance import verify
from library.io.packed_store import PackedStore
from tests.data.fakes import Counting, fake_vae
from tests.data.specs import dataset, subset, write_picture
from tests.ranks import server

NUM = 30
SECONDS = 0.01
KILLS = 3


def options_of(cache):
    return LatentCacheOptions("vae", to_disk=True, batch_size=2, place=CachePlace("packed", cache))


def table_of(folder):
    return assemble([dataset(subset(folder))])[0]


def work(folder, cache, ready, go):
    """What is killed: fills the cache with a slow encoder."""

    def slow(pixels, noise):
        time.sleep(SECONDS)
        return fake_vae(pixels, noise)

    table = table_of(folder)
    ready.release()
    go.wait()
    build_latents(table, lambda: slow, options=options_of(cache))


def kill(folder, cache, after):
    """Two processes begin to build and are killed together `after` seconds."""
    context = server()
    ready, go = context.Semaphore(0), context.Event()
    processes = [context.Process(target=work, args=(folder, cache, ready, go)) for _ in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    go.set()
    time.sleep(after)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def test_kill_9_tears_nothing_and_a_rerun_builds_exactly_what_is_missing(tmp_path):
    folder, cache = tmp_path / "pictures", tmp_path / "cache"
    for number in range(NUM):
        write_picture(folder / f"p{number:02}.png", 64, 64, caption="x", seed=number)
    right, _ = build_latents(table_of(folder), Counting(), options=LatentCacheOptions("vae", batch_size=2))
    rng, partial = random.Random(1), 0
    for _ in range(KILLS):
        shutil.rmtree(cache, ignore_errors=True)
        kill(folder, cache, rng.uniform(0.02, NUM / 2 * SECONDS))
        before = PackedStore.open(cache / "latents", facts_dtype=FACTS)
        assert all(problem.tail for problem in verify(before)), "only the record in flight may be incomplete"
        there = len(before.live())
        partial += 0 < there < NUM
        encode = Counting()
        store, report = build_latents(table_of(folder), encode, options=options_of(cache))
        assert (report.built, report.reused, len(report.stale)) == (NUM - there, there, 0)
        assert encode.images == NUM - there
        assert store.has(np.arange(NUM)).all()
        for row in range(NUM):
            latents, expected = (kind.get(row, flipped=False).latents_4hw for kind in (store, right))
            assert torch.equal(latents, expected.half())
    assert partial, "no kill came in the middle: the test has shown nothing"

"""Several runs on one cache: they share the work, and kill -9 tears nothing."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks import kill_cache
from library.data.assemble import assemble
from library.data.latent_caching import LatentCacheOptions, build_latents
from tests.data.fakes import Counting, fake_vae
from tests.data.specs import dataset, subset, write_picture

NUM = 24


@pytest.fixture
def folder(tmp_path):
    for number in range(NUM):
        write_picture(tmp_path / "pictures" / f"p{number:02}.png", 64, 64, caption="x", seed=number)
    return tmp_path / "pictures"


def table_of(folder):
    return assemble([dataset(subset(folder))])[0]


@pytest.mark.parametrize("options", [{}, {"skip_check": True}])
def test_an_entry_that_another_run_has_made_meanwhile_is_not_made_again(folder, options):
    other = Counting()
    options = LatentCacheOptions("vae", to_disk=True, batch_size=1, **options)

    def meanwhile(pixels, noise):
        if other.images == 0:
            build_latents(table_of(folder), other, options=options)
        return fake_vae(pixels, noise)

    encode = Counting(meanwhile)
    store, report = build_latents(table_of(folder), encode, options=options)
    # This run has decoded a few images before the other one came; the rest it finds.
    assert other.images == NUM and report.built == encode.images < NUM // 2
    assert report.built + report.reused == NUM and report.failed == []
    whole, _ = build_latents(table_of(folder), Counting(), options=LatentCacheOptions("vae"))
    for row in range(NUM):
        latents, right = (kind.get(row, flipped=False).latents_4hw for kind in (store, whole))
        assert torch.equal(latents, right)


def test_two_runs_at_once_share_the_work(folder, monkeypatch):
    offsets = iter([0, NUM // 2])
    monkeypatch.setattr("library.data.latent_caching.secrets.randbelow", lambda bound: next(offsets))
    begin = threading.Barrier(2, timeout=30)

    def slow(pixels, noise):
        threading.Event().wait(0.02)
        return fake_vae(pixels, noise)

    def run(encode):
        begin.wait()
        return build_latents(table_of(folder), encode, options=LatentCacheOptions("vae", to_disk=True, batch_size=1))

    encoders = [Counting(slow), Counting(slow)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, encoders))
    assert all(report.built + report.reused == NUM and not report.failed for _, report in results)
    assert NUM <= sum(encode.images for encode in encoders) < 2 * NUM
    assert len(list(folder.glob("*.npz"))) == NUM
    assert build_latents(table_of(folder), Counting(), options=LatentCacheOptions("vae", to_disk=True))[1].reused == NUM


@pytest.mark.parametrize("options", [{}, {"moments": False, "batch_size": 1}], ids=["batches", "one by one"])
def test_kill_9_tears_nothing_and_a_rerun_builds_exactly_what_is_missing(tmp_path, options):
    folder = tmp_path / "pictures"
    kill_cache.make_pictures(folder, 30)
    rng = random.Random(1)
    for _ in range(2):
        done = kill_cache.trial(folder, rng, processes=2, images=30, **options)
        assert done.there + done.rebuilt == 30

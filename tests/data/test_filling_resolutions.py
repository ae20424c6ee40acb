"""A cache of several resolutions that fills while training runs: one epoch leaves it complete, at all of them."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from library.data import collate
from library.data.cache_places import CachePlace
from library.data.dataset import build_train_data
from library.data.latent_caching import build_latents
from library.io import latent_cache
from library.sizes import Size
from tests.data.fakes import Counting, fake_vae
from tests.data.ranks import Ranks
from tests.data.specs import dataset, subset, write_folder
from tests.data.test_latent_filling import NUM, Run, assert_equal, built_before, noisy_vae, options_of
from tests.data.test_latent_moments import fake_moments

RESOLUTIONS = (Size(64, 64), Size(96, 96), Size(128, 128))


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "one" / "pictures")


def specs_of(folder, *, resolutions=RESOLUTIONS, **changes):
    one = subset(folder, **({"num_repeats": 2, "flip_aug": True} | changes))
    return [dataset(one, resolution=resolutions[0], other_resolutions=resolutions[1:])]


def num_entries(specs):
    """How many entries a pass before training would make."""
    return build_latents(build_train_data(specs, seed=5).all_images, Counting(), options=options_of(to_disk=False))[
        1
    ].built


def assert_complete(specs, like, **options):
    """The cache lacks nothing, and holds what a pass makes of equal pictures that lie elsewhere."""
    rest = Counting()
    table, other = (build_train_data(each, seed=5).all_images for each in (specs, like))
    store, report = build_latents(table, rest, options=options_of(**options))
    assert rest.loads == 0 and store.has(table.rows).all() and report.reused == num_entries(specs)
    encode = fake_moments if options.get("moments") else noisy_vae
    tolerance = 1e-2 if "place" in options else 1e-5  # a packed cache rounds
    expected, _ = build_latents(other, Counting(encode), options=options_of(**options | {"to_disk": False}))
    for row in table.rows.tolist():
        for flipped in (False, True):
            for one, two in zip(store.get(row, flipped=flipped), expected.get(row, flipped=flipped), strict=True):
                assert (one is None) == (two is None)
                assert one is None or torch.allclose(one.float(), two.float(), atol=tolerance)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("store", ["memory", "npz", "packed"])
@pytest.mark.parametrize("moments", [False, True])
def test_one_epoch_completes_the_cache(folder, tmp_path, caplog, workers, store, moments):
    encode = fake_moments if moments else noisy_vae
    caplog.set_level(logging.INFO)
    options = {"to_disk": store != "memory", "moments": moments}
    if store == "packed":
        options["place"] = CachePlace("packed", tmp_path / "cache")
    specs, others = specs_of(folder), specs_of(write_folder(tmp_path / "two" / "pictures"))
    before = built_before(others, encode=encode, to_disk=False, moments=moments)
    run = Run(specs, encode=encode, workers=workers, **options)
    entries = num_entries(specs)
    assert entries > 2 * NUM and not run.filler.is_complete
    for epoch in range(2):
        expected = [batch for group in before.epoch(epoch) for batch in group.micro_batches]
        batches = run.batches(epoch)
        assert all(batch.beside == () for batch in batches)
        if store != "packed":  # which rounds
            assert_equal(batches, expected)
        # Each image and its mirror image at each resolution, once.
        assert run.encode.images == 2 * entries and run.encode.loads == 1 and run.left == 1
        assert run.filler.is_complete and f"the cache is complete, {entries} entries, 0 failed" in caplog.text
    run.data.close()
    if options["to_disk"]:
        assert_complete(specs, others, **options)


def test_an_image_is_decoded_once_for_all_its_resolutions(folder, monkeypatch):
    read = []
    real = collate.read_pictures
    monkeypatch.setattr(
        collate, "read_pictures", lambda record, *a, **k: (read.append(record.key), real(record, *a, **k))[1]
    )
    run = Run(specs_of(folder, num_repeats=1))
    run.batches(0)
    assert sorted(read) == sorted(set(read)) and len(read) == NUM and run.filler.is_complete
    run.batches(1)
    assert len(read) == NUM
    run.data.close()


def test_a_jpeg_that_shrinks_is_decoded_as_each_resolution_wants_it(tmp_path, monkeypatch):
    specs = []
    for name in ("one", "two"):
        folder = tmp_path / name / "pictures"
        folder.mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (560, 720, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "a.jpg", quality=95)
        (folder / "a.txt").write_text("x")
        specs.append(specs_of(folder))
    scales = []
    real = collate.decode_scale
    monkeypatch.setattr(collate, "decode_scale", lambda *a: (scales.append(real(*a)), scales[-1])[1])
    run = Run(specs[0])
    run.batches(0)
    run.data.close()
    assert len(set(scales)) > 1
    assert_complete(*specs)


def test_masks_come_along(tmp_path):
    specs = []
    for name in ("one", "two"):
        folder = tmp_path / name / "pictures"
        folder.mkdir(parents=True)
        for number, (width, height) in enumerate([(64, 64), (150, 60), (128, 100)]):
            noise = np.random.default_rng(number).integers(0, 256, (height, width, 4), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"p{number}.png")
            (folder / f"p{number}.txt").write_text("x")
        specs.append(specs_of(folder, alpha_mask=True))
    run = Run(specs[0])
    run.batches(0)
    run.data.close()
    table = build_train_data(specs[0], seed=5).all_images
    stores = [
        build_latents(build_train_data(each, seed=5).all_images, Counting(noisy_vae), options=options_of())[0]
        for each in specs
    ]
    for row in table.rows.tolist():
        one, two = (store.get(row, flipped=True).mask_1hw for store in stores)
        assert one.std() > 0 and torch.allclose(one, two, atol=1e-6)
    assert_complete(*specs)


def test_what_is_cached_already_is_not_encoded_again(folder, monkeypatch):
    written = []
    real = latent_cache.write
    built_before(specs_of(folder, resolutions=RESOLUTIONS[1:2]))
    before = num_entries(specs_of(folder, resolutions=RESOLUTIONS[1:2]))
    monkeypatch.setattr(latent_cache, "write", lambda path, *rest: (written.append(path), real(path, *rest)))
    run = Run(specs_of(folder))
    run.batches(0)
    run.data.close()
    entries = num_entries(specs_of(folder))
    assert run.filler.is_complete and len(written) == len(set(written)) == entries - before
    assert run.encode.images == 2 * (entries - before)


@pytest.mark.parametrize("to_disk", [False, True])
def test_a_run_resumed_within_the_first_epoch_goes_on_exactly(folder, tmp_path, to_disk):
    def epoch(data, number, start=0):
        return [batch for group in data.epoch(number, start) for batch in group.micro_batches]

    specs = specs_of(folder)
    whole = built_before(specs, to_disk=False)
    first = Run(specs, to_disk=to_disk)
    groups = first.data.epoch(0)
    for _ in range(4):
        next(groups)
    first.data.finish_filling()
    first.data.close()
    second = Run(specs, to_disk=to_disk)
    assert_equal(second.batches(0, 4), epoch(whole, 0, 4))
    assert second.filler.is_complete == to_disk, "what was made in memory is gone"
    assert_equal(second.batches(1), epoch(whole, 1))
    second.data.close()
    assert second.left == 1 and second.filler.is_complete
    if to_disk:
        assert first.encode.images + second.encode.images == 2 * num_entries(specs)


def test_an_image_that_cannot_be_read_does_not_hold_up_the_end(folder):
    run = Run(specs_of(folder))
    (folder / "p2.png").write_bytes((folder / "p2.png").read_bytes()[:200])
    batches = run.batches(0)
    assert sum(len(batch.failures) for batch in batches) == 2
    assert run.left == 1 and run.filler.is_complete
    assert [failure.path for failure in run.filler.failures] == [str(folder / "p2.png")]
    run.data.close()


def test_latents_that_are_not_finite_at_another_resolution_cost_nothing_now(folder):
    def encode(pixels, noise):
        latents, finite = fake_vae(pixels, noise)
        finite[:] = pixels.shape[-1] != 128
        return latents, finite

    run = Run(specs_of(folder), encode=encode)
    batches = run.batches(0)
    for batch in batches:
        bad = batch.latents_B4hw.isnan().flatten(1).any(1)
        assert bad.all() if batch.bucket.w == 128 else not bad.any()
    assert run.filler.is_complete and run.filler.failures
    run.data.close()


@pytest.mark.parametrize("to_disk", [False, True])
def test_two_ranks_complete_one_cache_in_one_epoch(folder, to_disk, monkeypatch):
    specs = specs_of(folder)
    whole = built_before(specs, to_disk=False)

    def work(rank):
        run = Run(specs, rank=rank, world=2, to_disk=to_disk)
        epochs = [run.batches(0)]
        left = run.left
        epochs.append(run.batches(1))
        run.data.close()
        return run, epochs, left

    plain = {}
    for epoch in range(2):
        for batch in (batch for group in whole.epoch(epoch) for batch in group.micro_batches):
            plain |= {(epoch, key): row for key, row in zip(batch.keys, batch.latents_B4hw, strict=True)}
    met = 0
    for run, epochs, left in Ranks(2, monkeypatch).run(work):
        assert left == run.left == 1 and run.encode.images > 0
        for epoch, batches in enumerate(epochs):
            for batch in batches:
                for key, row in list(zip(batch.keys, batch.latents_B4hw, strict=True))[: batch.num_real]:
                    assert torch.allclose(row, plain[epoch, key], atol=1e-6)
                    met += 1
    assert met == 2 * 2 * NUM

"""A cache that fills while training runs: the same batches as with a cache made before, and complete after an epoch."""

import threading

import pytest
import torch

from library.data.assemble import assemble
from library.data.cache_places import CachePlace
from library.data.dataset import build_train_data
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.data.latent_filling import LatentFiller
from library.errors import UserError
from library.io import latent_cache
from tests.data.fakes import Counting, fake_vae
from tests.data.ranks import Ranks
from tests.data.specs import dataset, subset, write_folder
from tests.data.test_latent_moments import fake_moments

NUM = 7


def noisy_vae(pixels_B3HW, noise_B4hw):
    latents, finite = fake_vae(pixels_B3HW, noise_B4hw)
    return latents + noise_B4hw, finite


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


def specs_of(folder, **changes):
    return [dataset(subset(folder, num_repeats=2, flip_aug=True, **changes))]


def options_of(**changes):
    return LatentCacheOptions(**({"vae_id": "vae", "to_disk": True, "batch_size": 2} | changes))


class Run:
    """Training data whose cache fills; counts what is encoded and how often the VAE was sent away."""

    def __init__(self, specs, *, encode=noisy_vae, rank=0, world=1, workers=0, **options):
        self.encode, self.left = Counting(encode), 0
        self.data = build_train_data(specs, seed=5, rank=rank, world=world, num_workers=workers)
        self.filler = LatentFiller(
            self.data.all_images,
            self.encode,
            options=options_of(**options),
            done=self.leave,
            rank=rank,
            world=world,
        )
        self.data.fill_latents(self.filler)

    def leave(self):
        self.left += 1

    def batches(self, epoch, start=0):
        return [batch for group in self.data.epoch(epoch, start) for batch in group.micro_batches]


def built_before(specs, *, encode=noisy_vae, **options):
    data = build_train_data(specs, seed=5)
    data.attach_latents(build_latents(data.all_images, Counting(encode), options=options_of(**options))[0])
    return data


def assert_equal(filled, before):
    for left, right in zip(filled, before, strict=True):
        assert left.keys == right.keys and left.pixels_B3HW is None and left.awaits == ()
        assert torch.equal(left.sizes_B6, right.sizes_B6) and torch.equal(left.weight_B, right.weight_B)
        for name in ("latents_B4hw", "moments_B8hw"):
            one, two = getattr(left, name), getattr(right, name)
            assert (one is None) == (two is None) and (one is None or torch.allclose(one, two, atol=1e-6))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("moments", [False, True])
def test_batches_are_those_of_a_cache_made_before(tmp_path, workers, to_disk, moments):
    encode = fake_moments if moments else noisy_vae
    specs, others = (specs_of(write_folder(tmp_path / name / "pictures")) for name in ("one", "two"))
    before = built_before(others, encode=encode, to_disk=to_disk, moments=moments)
    run = Run(specs, encode=encode, workers=workers, to_disk=to_disk, moments=moments)
    for epoch in range(2):
        expected = [batch for group in before.epoch(epoch) for batch in group.micro_batches]
        assert_equal(run.batches(epoch), expected)
        # Each image and its mirror image, once, in the first epoch.
        assert run.encode.images == 2 * NUM and run.encode.loads == 1 and run.left == 1
    run.data.close()
    if to_disk:
        rest = Counting()
        table = assemble(specs)[0]
        store, report = build_latents(table, rest, options=options_of(moments=moments))
        assert report.reused == NUM and rest.loads == 0 and store.has(table.rows).all()


@pytest.mark.parametrize("moments", [False, True])
def test_what_is_trained_on_while_filling_a_packed_cache_is_what_is_read_from_it_later(folder, tmp_path, moments):
    options = {"place": CachePlace("packed", tmp_path / "cache"), "moments": moments}
    encode = fake_moments if moments else noisy_vae
    epochs = []
    for _ in range(2):
        run = Run(specs_of(folder), encode=encode, **options)
        epochs.append(run.batches(0))
        run.data.close()
    name = "moments_B8hw" if moments else "latents_B4hw"
    for one, other in zip(*epochs, strict=True):
        assert torch.equal(getattr(one, name).float(), getattr(other, name).float())


def test_a_complete_cache_needs_no_encoder_and_lets_the_vae_go_at_once(folder):
    built_before(specs_of(folder))
    run = Run(specs_of(folder))
    assert run.left == 1 and run.filler.is_complete
    run.batches(0)
    assert run.encode.loads == 0
    run.data.close()


@pytest.mark.parametrize("to_disk", [False, True])
def test_a_run_resumed_within_the_first_epoch_completes_the_cache(folder, to_disk):
    whole = built_before(specs_of(folder), to_disk=False)
    first = Run(specs_of(folder), to_disk=to_disk)
    groups = first.data.epoch(0)
    for _ in range(3):
        next(groups)
    first.data.finish_filling()
    first.data.close()
    assert 0 < first.encode.images < 2 * NUM
    second = Run(specs_of(folder), to_disk=to_disk)
    assert_equal(second.batches(0, 3), [b for group in whole.epoch(0, 3) for b in group.micro_batches])
    assert_equal(second.batches(1), [b for group in whole.epoch(1) for b in group.micro_batches])
    second.data.close()
    assert second.left == 1 and second.filler.is_complete
    together = first.encode.images * to_disk + second.encode.images
    assert together == 2 * NUM


def test_an_image_that_cannot_be_read_costs_its_samples_and_does_not_hold_up_the_end(folder):
    run = Run(specs_of(folder))
    (folder / "p2.png").write_bytes((folder / "p2.png").read_bytes()[:200])
    batches = run.batches(0)
    assert sum(len(batch.failures) for batch in batches) == 2
    assert sum(batch.num_real for batch in batches) == 2 * NUM - 2
    assert run.left == 1 and run.encode.images == 2 * (NUM - 1)
    assert sum(batch.num_real for batch in run.batches(1)) == 2 * NUM - 2
    run.data.close()


def test_an_old_file_of_an_image_without_finite_latents_is_not_used(folder):
    def encode(pixels, noise):
        latents, finite = noisy_vae(pixels, noise)
        finite[:] = pixels.shape[-1] != 96
        return latents, finite

    built_before(specs_of(folder), vae_id="another")
    run = Run(specs_of(folder), encode=encode)
    run.batches(0)
    assert sum(batch.num_real for batch in run.batches(1)) == 2 * NUM - 4
    run.data.close()


def test_an_image_without_finite_latents_is_marked_for_the_step_and_then_left_out(folder):
    def encode(pixels, noise):
        latents, finite = noisy_vae(pixels, noise)
        finite[:] = pixels.shape[-1] != 96
        return latents, finite

    run = Run(specs_of(folder), encode=encode)
    rows = [row for batch in run.batches(0) for row in batch.latents_B4hw[: batch.num_real]]
    assert sum(bool(row.isnan().all()) for row in rows) == 4 and len(rows) == 2 * NUM
    assert run.left == 1 and len(list(folder.glob("*.npz"))) == NUM - 2
    assert sum(batch.num_real for batch in run.batches(1)) == 2 * NUM - 4
    run.data.close()


def test_many_repeats_do_not_keep_many_entries_at_hand(folder, monkeypatch):
    monkeypatch.setattr("library.data.latent_filling.REMEMBERED", 2)
    written = []
    monkeypatch.setattr(
        latent_cache, "write", lambda path, *rest, real=latent_cache.write: (written.append(path), real(path, *rest))
    )
    expected = built_before(specs_of(folder), to_disk=False)
    run = Run(specs_of(folder), workers=2)
    assert_equal(run.batches(0), [b for group in expected.epoch(0) for b in group.micro_batches])
    assert len(written) == NUM
    run.data.close()


def test_a_full_disk_stops_the_run_with_its_sentence(folder, monkeypatch):
    def full(path, *rest):
        raise UserError("no space left on the disk while writing", where=str(path))

    run = Run(specs_of(folder))
    monkeypatch.setattr(latent_cache, "write", full)
    with pytest.raises(UserError, match="no space left"):
        run.batches(0)
    with pytest.raises(UserError, match="no space left"):
        run.data.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "behind"]


def test_ranks_agree_on_the_end_when_only_one_of_them_meets_a_bad_image(folder, monkeypatch):
    def encode(pixels, noise):
        latents, finite = noisy_vae(pixels, noise)
        finite[:] = pixels.shape[-1] != 96
        return latents, finite

    def work(rank):
        run = Run(specs_of(folder), encode=encode, rank=rank, world=2)
        groups = run.data.epoch(0)
        for _ in range(run.data.steps_in(0)):  # the trainer leaves a last epoch without exhausting it
            next(groups)
        run.data.finish_filling()
        run.data.close()
        return run

    runs = Ranks(2, monkeypatch).run(work)
    assert [run.left for run in runs] == [1, 1] and all(run.filler.is_complete for run in runs)


@pytest.mark.parametrize("to_disk", [False, True])
def test_two_ranks_fill_one_cache(folder, to_disk, monkeypatch):
    whole = built_before(specs_of(folder), to_disk=False)

    def work(rank):
        run = Run(specs_of(folder), rank=rank, world=2, to_disk=to_disk)
        epochs = [run.batches(0), run.batches(1)]
        run.data.close()
        return run, epochs

    ranks = Ranks(2, monkeypatch).run(work)
    plain = {}
    for epoch in range(2):
        for batch in (batch for group in whole.epoch(epoch) for batch in group.micro_batches):
            plain |= {(epoch, key): row for key, row in zip(batch.keys, batch.latents_B4hw, strict=True)}
    met = 0
    for run, epochs in ranks:
        assert run.left == 1 and run.filler.is_complete
        for epoch, batches in enumerate(epochs):
            for batch in batches:
                for key, row in list(zip(batch.keys, batch.latents_B4hw, strict=True))[: batch.num_real]:
                    assert torch.allclose(row, plain[epoch, key], atol=1e-6)
                    met += 1
    assert met == 2 * 2 * NUM
    encoded = [run.encode.images for run, _ in ranks]
    assert min(encoded) > 0 and sum(encoded) < 2 * 2 * NUM

"""TrainData as the trainer sees it: batches that depend on nothing but seed, epoch and data."""

import logging
import pickle
from collections import Counter

import pytest
import torch

from library.data.collate import BatchBuilder
from library.data.dataset import build_train_data
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.data.records import Skipped
from library.data.stores import TextStore
from library.data.text_caching import TextCacheOptions, build_text
from library.data.transforms import crop_info
from library.diffusion.conditioning import Tokens
from library.diffusion.crops import legacy_size_ids, size_ids
from library.errors import UserError
from tests.data.fakes import fake_text_encoder, fake_vae
from tests.data.specs import dataset, subset, write_folder, write_picture

RANDOM = {"flip_aug": True, "random_crop": True, "shuffle_caption": True, "caption_dropout_rate": 0.2, "num_repeats": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven pictures in four buckets."""
    return write_folder(tmp_path_factory.mktemp("data") / "pictures")


def build(folder, *, dataset_changes=None, subset_changes=None, **settings):
    spec = dataset(subset(folder, **(subset_changes or {})), **(dataset_changes or {}))
    return build_train_data([spec], **({"seed": 7} | settings))


def rows(groups):
    """Every real sample with all that is in its row."""
    out = {}
    for group in groups:
        for batch in group.micro_batches:
            for row in range(batch.num_real):
                out[batch.keys[row]] = (
                    batch.captions[row],
                    batch.bucket,
                    tuple(batch.sizes_B6[row].tolist()),
                    batch.pixels_B3HW[row].double().sum().item(),
                    batch.pixels_B3HW[row, :, 0, 0].sum().item(),
                )
    return out


def same(first, second):
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert one.samples == two.samples
        for a, b in zip(one.micro_batches, two.micro_batches, strict=True):
            assert (a.keys, a.captions, a.num_real) == (b.keys, b.captions, b.num_real)
            assert torch.equal(a.sizes_B6, b.sizes_B6) and torch.equal(a.weight_B, b.weight_B)
            assert torch.equal(a.pixels_B3HW, b.pixels_B3HW)
    return True


def test_an_epoch_serves_every_image_as_often_as_it_repeats(folder):
    data = build(folder, subset_changes=RANDOM, accumulation=2)
    groups = list(data.epoch(0))
    assert len(groups) == data.steps_in(0)
    assert sum(len(group.micro_batches) for group in groups) == data.batches_per_epoch
    served = Counter(key.record for group in groups for batch in group.micro_batches for key in batch.keys)
    assert served == {record.key: 2 for record in data.records}
    for group in groups:
        assert group.samples == sum(batch.num_real for batch in group.micro_batches)
        for batch in group.micro_batches:
            assert batch.pixels_B3HW.shape == (len(batch), 3, batch.bucket.h, batch.bucket.w)
            assert batch.pixels_B3HW.min() >= -1 and batch.pixels_B3HW.max() <= 1
            assert batch.sizes_B6.dtype == torch.float32
            assert batch.sizes_B6[:, 4:].tolist() == [[batch.bucket.h, batch.bucket.w]] * len(batch)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(folder, persistent):
    alone = build(folder, subset_changes=RANDOM)
    helped = build(folder, subset_changes=RANDOM, num_workers=2, persistent_workers=persistent)
    before = torch.get_rng_state()
    for epoch, start in ((0, 0), (1, 2), (2, 0)):
        assert same(list(alone.epoch(epoch, start)), list(helped.epoch(epoch, start)))
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_left_early_does_not_disturb_the_next(folder):
    alone = build(folder, subset_changes=RANDOM)
    helped = build(folder, subset_changes=RANDOM, num_workers=2, persistent_workers=True)
    next(iter(helped.epoch(0)))
    assert same(list(alone.epoch(1)), list(helped.epoch(1)))


def test_the_builder_can_be_sent_to_a_spawned_worker(folder):
    data = build(folder, subset_changes=RANDOM, tokenize=lambda captions: None)
    builder = pickle.loads(pickle.dumps(data._builder()))
    assert isinstance(builder, BatchBuilder)
    assert len(pickle.dumps(builder)) < 20_000


def test_a_later_start_gives_the_tail(folder):
    data = build(folder, subset_changes=RANDOM, accumulation=2)
    whole = list(data.epoch(3))
    assert len(whole) > 2
    for start in range(len(whole) + 1):
        assert same(whole[start:], list(data.epoch(3, start)))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_samples_that_one_process_with_a_larger_batch_would_have(folder, world):
    one = build(folder, subset_changes=RANDOM, dataset_changes={"batch_size": world}, accumulation=2)
    many = [
        build(folder, subset_changes=RANDOM, dataset_changes={"batch_size": 1}, accumulation=2, world=world, rank=rank)
        for rank in range(world)
    ]
    for whole, *parts in zip(one.epoch(0), *(data.epoch(0) for data in many), strict=True):
        together = {key: row for part in parts for key, row in rows([part]).items()}
        assert together == rows([whole])
        assert {part.samples for part in parts} == {whole.samples}
        for batches in zip(*(part.micro_batches for part in parts), strict=True):
            assert len({len(batch) for batch in batches}) == 1 and len(batches[0]) >= 1
            assert len({batch.bucket for batch in batches}) == 1
            for batch in batches:
                assert batch.weight_B.tolist() == [1.0] * batch.num_real + [0.0] * (len(batch) - batch.num_real)


def test_epochs_differ_in_order_crop_flip_and_caption(folder):
    data = build(folder, subset_changes=RANDOM)
    first, second = rows(data.epoch(0)), rows(data.epoch(1))
    assert first.keys() == second.keys()
    assert list(first) != list(second)
    for column in (0, 2, 3):
        assert any(first[key][column] != second[key][column] for key in first), column


def test_repeats_of_an_image_have_draws_of_their_own(folder):
    seen = rows(build(folder, subset_changes=RANDOM | {"num_repeats": 8}).epoch(0))
    by_image = {}
    for key, row in seen.items():
        by_image.setdefault(key.record, set()).add((row[0], row[2]))
    assert any(len(variants) > 2 for variants in by_image.values())


def test_every_nth_epoch_without_captions_counts_from_one(folder):
    data = build(folder, subset_changes={"caption_dropout_every_n_epochs": 2})
    empty = [all(row[0] == "" for row in rows(data.epoch(epoch)).values()) for epoch in range(4)]
    assert empty == [False, True, False, True]


def test_size_ids_are_real_or_those_of_sd_scripts(folder):
    for legacy, ids in ((False, size_ids), (True, legacy_size_ids)):
        data = build(folder, legacy_crop=legacy)
        seen = rows(data.epoch(0))
        for image in data.table:
            expected = ids(crop_info(image.record.size, image.placement, flipped=False))
            assert seen[image.record.key, 0][2] == expected
    assert any(
        size_ids(crop_info(image.record.size, image.placement, flipped=False))
        != legacy_size_ids(crop_info(image.record.size, image.placement, flipped=False))
        for image in data.table
    )


def test_captions_are_tokenised_in_the_main_process(folder):
    def tokenize(captions):
        ids = torch.tensor([[[len(caption)] * 77] for caption in captions])
        return Tokens(ids, ids)

    for group in build(folder, tokenize=tokenize, num_workers=1).epoch(0):
        for batch in group.micro_batches:
            assert batch.tokens.ids_1_BnL[:, 0, 0].tolist() == [len(caption) for caption in batch.captions]


def test_several_data_sets_keep_their_batch_sizes_and_resolutions(folder, tmp_path):
    other = write_folder(tmp_path / "other", sizes=[(64, 64)] * 5)
    specs = [dataset(subset(folder), batch_size=3), dataset(subset(other), batch_size=2, enable_bucket=False)]
    data = build_train_data(specs, seed=1)
    sizes = Counter()
    for group in data.epoch(0):
        for batch in group.micro_batches:
            names = {key.record.split("/")[0] for key in batch.keys}
            assert len(names) == 1
            sizes[names.pop(), len(batch)] += 1
    assert sizes["other", 2] == 2 and sizes["other", 1] == 1
    assert max(size for name, size in sizes if name == "pictures") == 3


def test_an_image_that_breaks_during_training_costs_its_sample_only(tmp_path, caplog):
    folder = write_folder(tmp_path / "pictures", sizes=[(64, 64)] * 4)
    data = build(folder)
    (folder / "p1.png").write_bytes(b"gone bad")
    with caplog.at_level(logging.WARNING):
        groups = list(data.epoch(0)) + list(data.epoch(1))
    real = Counter(key.record for g in groups for b in g.micro_batches for key in b.keys[: b.num_real])
    assert real == {f"pictures/p{n}.png": 2 for n in (0, 2, 3)}
    assert [group.samples for group in groups] == [2, 2, 2, 2]
    short = [b for g in groups for b in g.micro_batches if b.num_real == 1]
    assert len(short) == 2
    for batch in short:
        assert batch.weight_B.tolist() == [1.0, 0.0]
        assert torch.equal(batch.pixels_B3HW[0], batch.pixels_B3HW[1])
    assert len([record for record in caplog.records if "p1.png" in record.getMessage()]) == 1


def test_a_batch_of_broken_images_only_is_blank_and_weightless(tmp_path):
    folder = write_folder(tmp_path / "pictures", sizes=[(64, 64)] * 2)
    data = build(folder)
    for path in folder.glob("*.png"):
        path.unlink()
    (batch,) = next(data.epoch(0)).micro_batches
    assert batch.num_real == 0 and batch.weight_B.tolist() == [0.0, 0.0]
    assert batch.pixels_B3HW.shape == (2, 3, 64, 64) and not batch.pixels_B3HW.any()


def test_an_image_replaced_by_one_of_another_size_is_not_distorted_but_left_out(tmp_path):
    folder = write_folder(tmp_path / "pictures", sizes=[(64, 64)] * 2)
    data = build(folder)
    write_picture(folder / "p0.png", 96, 64)
    (batch,) = next(data.epoch(0)).micro_batches
    assert [key.record for key in batch.keys[: batch.num_real]] == ["pictures/p1.png"]
    assert "96x64" in batch.failures[0].reason


def test_nothing_left_to_train_on_is_an_error_with_the_reasons(tmp_path):
    tmp_path.joinpath("a.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"a\.png"):
        build(tmp_path)


@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_batches_equal_uncached_ones(tmp_path, to_disk):
    folder = write_folder(tmp_path / "pictures")
    changes = {"flip_aug": True, "caption_dropout_rate": 0.3, "caption_prefix": "p"}
    plain = list(build(folder, subset_changes=changes).epoch(0))
    cached = build(folder, subset_changes=changes, num_workers=2)
    store, _ = build_latents(
        cached.table, lambda: fake_vae, options=LatentCacheOptions("v", to_disk=to_disk, batch_size=2)
    )
    cached.attach_latents(store)
    texts, _ = build_text(cached.table, fake_text_encoder, options=TextCacheOptions("t", 1, to_disk=to_disk))
    cached.attach_text(texts)
    assert store.in_memory == texts.in_memory == (not to_disk)
    if not to_disk:
        for path in folder.iterdir():
            path.unlink()
    dropped = 0
    for one, two in zip(plain, cached.epoch(0), strict=True):
        for a, b in zip(one.micro_batches, two.micro_batches, strict=True):
            assert (a.keys, a.captions) == (b.keys, b.captions)
            assert b.pixels_B3HW is None and b.tokens is None
            assert torch.equal(a.sizes_B6, b.sizes_B6)
            assert torch.allclose(fake_vae(a.pixels_B3HW, None)[0], b.latents_B4hw, atol=1e-6)
            assert torch.equal(fake_text_encoder(a.captions).hidden_BTD, b.text.hidden_BTD)
            assert torch.equal(fake_text_encoder(a.captions).pooled_BP, b.text.pooled_BP)
            dropped += b.captions.count("")
    assert dropped > 0


def test_a_cache_file_that_breaks_during_training_costs_its_sample_only(tmp_path):
    folder = write_folder(tmp_path / "pictures", sizes=[(64, 64)] * 2)
    data = build(folder)
    store, _ = build_latents(data.table, lambda: fake_vae, options=LatentCacheOptions("v", to_disk=True))
    data.attach_latents(store)
    next(folder.glob("p0*.npz")).write_bytes(b"torn")
    (batch,) = next(data.epoch(0)).micro_batches
    assert [key.record for key in batch.keys[: batch.num_real]] == ["pictures/p1.png"]
    assert batch.latents_B4hw.shape == (2, 4, 8, 8)


def test_dropped_images_are_gone_for_good(folder):
    data = build(folder)
    victim = data.records[2]
    data.drop([Skipped(victim.path, "no latents")])
    assert victim.key not in {key.record for g in data.epoch(0) for b in g.micro_batches for key in b.keys}
    assert data.summary().skipped == ((victim.path, "no latents"),)


def test_a_batch_moves_whole(folder):
    data = build(folder, tokenize=lambda captions: Tokens(*[torch.zeros(len(captions), 1, 77).long()] * 2))
    batch = next(data.epoch(0)).micro_batches[0].to("meta")
    assert {t.device.type for t in (batch.pixels_B3HW, batch.sizes_B6, batch.weight_B, batch.tokens.ids_2_BnL)} == {
        "meta"
    }
    text = TextStore(None, None, None, empty=fake_text_encoder([""])).get(0, empty=True)
    assert text.pooled_BP.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_token_warm_up_follows_the_steps_of_the_run(folder, workers):
    data = build(
        folder, subset_changes={"token_warmup_step": 0.5, "num_repeats": 2}, accumulation=2, num_workers=workers
    )
    data.set_length(4 * data.steps_in(0))
    length = 2 * data.steps_in(0)
    for epoch, start in ((0, 0), (1, 0), (1, 2), (2, 0)):
        for step, group in enumerate(data.epoch(epoch, start), epoch * data.steps_in(0) + start):
            parts = {len(caption.split(", ")) for batch in group.micro_batches for caption in batch.captions}
            assert parts == {3 if step >= length else step * 2 // length + 1}

"""Which of the cached wordings a batch takes, and that its encoding is that of the caption it reports."""

import random
from collections import Counter

import pytest
import torch

from library.data.captions import is_dropped
from library.data.dataset import build_train_data
from library.data.text_caching import TextCacheOptions, build_text
from tests.data.ranks import Ranks
from tests.data.specs import dataset, subset
from tests.data.variants import NUM, SHUFFLE, Encoder, digests, figures, variants, write_pictures


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path)


def data_of(folder, *, seed=7, to_disk=False, num_variants=3, subset_changes=None, cached=True, **settings):
    changes = SHUFFLE | {"caption_dropout_rate": 0.2, "num_repeats": 2} | (subset_changes or {})
    spec = dataset(subset(folder, **changes), batch_size=settings.pop("batch_size", 2))
    data = build_train_data([spec], seed=seed, **settings)
    if cached:
        options = TextCacheOptions("te", 1, to_disk=to_disk, num_variants=num_variants)
        data.attach_text(build_text(data.table, digests, options=options)[0])
    return data


def visits(groups):
    """key -> (caption, pooled encoding) of every real row."""
    found = {}
    for group in groups:
        for batch in group.micro_batches:
            expected = digests(batch.captions)
            assert torch.equal(batch.text.hidden_BTD, expected.hidden_BTD)
            assert torch.equal(batch.text.pooled_BP, expected.pooled_BP)
            found.update({batch.keys[row]: batch.captions[row] for row in range(batch.num_real)})
    return found


@pytest.mark.parametrize(("to_disk", "workers"), [(False, 0), (True, 0), (True, 2)])
def test_a_batch_reports_the_wording_whose_encoding_it_holds_in_any_epoch(folder, to_disk, workers):
    data = data_of(folder, to_disk=to_disk, num_workers=workers)
    records = {record.key: variants(record, 3) for record in data.records}
    used = {key: Counter() for key in records}
    for epoch in range(3 if workers else 25):
        for key, caption in visits(data.epoch(epoch)).items():
            used[key.record][caption] += 1
    for key, wordings in records.items():
        assert set(used[key]) <= {"", *wordings}
    if not workers:
        total = sum(used.values(), Counter())
        assert all(set(used[key]) == {"", *wordings} for key, wordings in records.items()), "every variant is drawn"
        assert 0.1 < total[""] / total.total() < 0.3
        shares = [sum(used[key][wordings[k]] for key, wordings in records.items()) for k in range(3)]
        assert all(0.2 < share / sum(shares) < 0.47 for share in shares), "evenly"


def test_the_seed_draws_the_variant_and_does_not_make_it(folder):
    one, other = (visits(data_of(folder, seed=seed).epoch(0)) for seed in (1, 2))
    assert one.keys() == other.keys() and one != other
    again = visits(data_of(folder, seed=1).epoch(0))
    assert again == one and visits(data_of(folder, seed=1).epoch(1)) != one


def test_repeats_of_an_image_have_variants_of_their_own(folder):
    seen = visits(data_of(folder, subset_changes={"num_repeats": 8}).epoch(0))
    by_image = {}
    for key, caption in seen.items():
        by_image.setdefault(key.record, set()).add(caption)
    assert any(len(captions) > 2 for captions in by_image.values())


def test_dropout_falls_on_the_same_visits_as_without_a_cache(folder):
    cached, plain = data_of(folder), data_of(folder, cached=False)
    for epoch in range(3):
        dropped = {key for key, caption in visits(cached.epoch(epoch)).items() if not caption}
        fresh = {
            key
            for group in plain.epoch(epoch)
            for batch in group.micro_batches
            for key, caption in zip(batch.keys, batch.captions, strict=True)
            if not caption
        }
        assert dropped == fresh != set()


def test_every_nth_epoch_goes_without_captions(folder):
    data = data_of(folder, subset_changes={"caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 2})
    empty = [not any(visits(data.epoch(epoch)).values()) for epoch in range(4)]
    assert empty == [False, True, False, True]
    spec = subset(caption_dropout_every_n_epochs=2)
    assert [is_dropped(spec, rng=random.Random(0), epoch=epoch) for epoch in (1, 2, 3, 4)] == [False, True] * 2


def test_a_later_start_gives_the_tail_with_its_variants(folder):
    data = data_of(folder, to_disk=True)
    whole = [[batch.captions for batch in group.micro_batches] for group in data.epoch(2)]
    for start in range(len(whole) + 1):
        resumed = data_of(folder, to_disk=True)
        assert [[batch.captions for batch in group.micro_batches] for group in resumed.epoch(2, start)] == whole[start:]


@pytest.mark.parametrize("to_disk", [False, True])
def test_ranks_and_batch_sizes_change_no_wording(folder, to_disk, monkeypatch):
    one = visits(data_of(folder, batch_size=2).epoch(1))

    def work(rank):
        data = data_of(folder, batch_size=1, cached=False, world=2, rank=rank)
        options = TextCacheOptions("te", 1, to_disk=to_disk, num_variants=3, batch_size=4)
        encode = Encoder()
        store, report = build_text(data.table, encode, options=options, rank=rank, world=2)
        data.attach_text(store)
        return data, report, encode

    ranks = Ranks(2, monkeypatch).run(work)
    (_, report_0, encode_0), (_, report_1, encode_1) = ranks
    assert report_0 == report_1 and figures(report_0) == (NUM if to_disk else 3 * NUM, 0, 0, 0)
    assert len(set(encode_0.captions + encode_1.captions)) == 3 * NUM + 1
    assert len(encode_0.captions + encode_1.captions) == 3 * NUM + 2, "each wording once, the empty one on each rank"
    assert min(len(encode_0.captions), len(encode_1.captions)) > NUM
    together = {}
    for data, _, _ in ranks:
        together |= visits(data.epoch(1))
    assert together == one


def test_a_file_that_breaks_during_training_costs_its_samples_only(folder):
    data = data_of(folder, to_disk=True, subset_changes={"caption_dropout_rate": 0.0})
    (folder / "p2_te_outputs.npz").write_bytes(b"torn")
    batches = [batch for group in data.epoch(0) for batch in group.micro_batches]
    real = {key.record for batch in batches for key in batch.keys[: batch.num_real]}
    assert real == {f"pictures/p{number}.png" for number in range(NUM) if number != 2}
    assert any(batch.failures for batch in batches)

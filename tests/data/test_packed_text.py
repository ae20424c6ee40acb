"""Encoded captions in a packed cache: equal ones once, none encoded twice, and rows as without a cache."""

import pickle

import pytest
import torch

from library.data.assemble import assemble
from library.data.cache_places import CachePlace
from library.data.dataset import build_train_data
from library.data.text_caching import TextCacheOptions, build_text
from library.diffusion.conditioning import TextCond
from library.errors import UserError
from library.io.packed_maintenance import statistics
from library.io.packed_store import PackedStore
from tests.data.fakes import fake_text_encoder
from tests.data.ranks import Ranks
from tests.data.specs import dataset, subset, write_folder, write_picture

NUM = 7


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


class Encoder:
    """Counts what it is asked to encode."""

    def __init__(self, encode=fake_text_encoder):
        self.captions = []
        self.encode = encode

    def __call__(self, captions):
        self.captions += captions
        return self.encode(captions)


@pytest.fixture
def build(tmp_path, folder):
    """build(...) encodes the captions of the folder into the packed cache of the test."""

    def run(*, encode=None, table=None, subset_changes=None, rank=0, world=1, **options):
        if table is None:
            table, _ = assemble([dataset(subset(folder, **(subset_changes or {})))])
        place = CachePlace("packed", tmp_path / "cache")
        values = {"text_encoder_id": "te", "width_1": 1, "to_disk": True, "place": place, "batch_size": 2} | options
        return build_text(table, encode or Encoder(), options=TextCacheOptions(**values), rank=rank, world=world)

    return run


def figures(report):
    return report.built, report.reused, len(report.stale)


def test_a_complete_cache_needs_no_encoder(build):
    encode = Encoder()
    assert figures(build(encode=encode)[1]) == (NUM, 0, 0)
    assert sorted(encode.captions) == sorted(["", *(f"a, b{n}, c" for n in range(NUM))])
    again = Encoder()
    store, report = build(encode=again)
    assert figures(report) == (0, NUM, 0) and again.captions == []
    for number in range(NUM):
        expected = fake_text_encoder([f"a, b{number}, c"]).to(dtype=torch.float16)
        row = store.get(number)
        assert row.hidden_BTD.dtype == torch.float16
        assert torch.equal(row.hidden_BTD, expected.hidden_BTD) and torch.equal(row.pooled_BP, expected.pooled_BP)
    assert torch.equal(store.get(0, empty=True).hidden_BTD, fake_text_encoder([""]).hidden_BTD.half())


def test_equal_captions_are_kept_once(folder, build, tmp_path):
    for number in range(NUM):
        (folder / f"p{number}.txt").write_text("the same", encoding="utf-8")
    store, report = build()
    assert figures(report) == (1, 0, 0)
    assert statistics(PackedStore.open(tmp_path / "cache" / "text")).entries == 2  # and the empty caption
    assert torch.equal(store.get(0).pooled_BP, store.get(6).pooled_BP)


def test_one_changed_caption_is_the_only_one_encoded(folder, build):
    build()
    (folder / "p2.txt").write_text("something else", encoding="utf-8")
    encode = Encoder()
    assert figures(build(encode=encode)[1]) == (1, NUM - 1, 0)
    assert encode.captions == ["something else"]


def test_other_encoders_replace_entries_and_other_lengths_lie_beside_them(build):
    build()
    _, report = build(text_encoder_id="other")
    assert figures(report) == (NUM, 0, NUM) and {stale.reason for stale in report.stale} == {"text encoder changed"}

    def long(captions):
        rows = fake_text_encoder(captions)
        return TextCond(rows.hidden_BTD.repeat(1, 2, 1)[:, :152], rows.pooled_BP)

    for changes in ({"max_token_length": 150, "encode": Encoder(long)}, {"weighted": True}):
        assert figures(build(text_encoder_id="other", **changes)[1]) == (NUM, 0, 0)
    for changes in ({}, {"max_token_length": 150}, {"weighted": True}):
        encode = Encoder()
        assert figures(build(text_encoder_id="other", **changes | {"encode": encode})[1]) == (0, NUM, 0)
        assert encode.captions == []


def test_an_interrupted_pass_goes_on_where_it_stopped(build):
    def stop(captions):
        if "a, b4, c" in captions:
            raise KeyboardInterrupt
        return fake_text_encoder(captions)

    with pytest.raises(KeyboardInterrupt):
        build(encode=Encoder(stop))
    _, report = build()
    assert report.built + report.reused == NUM and 0 < report.reused < NUM


def test_ranks_share_the_work_and_all_have_everything(build, monkeypatch):
    ranks, encoders = Ranks(2, monkeypatch), [Encoder(), Encoder()]
    results = ranks.run(lambda rank: build(encode=encoders[rank], batch_size=1, rank=rank, world=2))
    asked = [caption for encoder in encoders for caption in encoder.captions if caption]
    assert len(asked) == NUM and len(set(asked)) == NUM
    for store, report in results:
        assert figures(report) == (NUM, 0, 0)
        for number in range(NUM):
            expected = fake_text_encoder([f"a, b{number}, c"]).pooled_BP.half()
            assert torch.equal(store.get(number).pooled_BP, expected)
    silent = [Encoder(), Encoder()]
    again = ranks.run(lambda rank: build(encode=silent[rank], rank=rank, world=2)[1])
    assert [figures(report) for report in again] == [(0, NUM, 0)] * 2
    assert not silent[0].captions and not silent[1].captions


def test_values_beyond_float16_are_kept(build):
    def large(captions):
        rows = fake_text_encoder(captions)
        return TextCond(rows.hidden_BTD * 1e6, rows.pooled_BP)

    store, _ = build(encode=Encoder(large))
    assert store.get(0).hidden_BTD.dtype == torch.float32 and store.get(0).hidden_BTD.max() > 65504


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_encoding_of_the_caption_they_show(folder, build, workers, monkeypatch):
    """In epochs 0 and 1, with whole captions dropped."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    specs = [dataset(subset(folder, caption_dropout_rate=0.5, num_repeats=2))]
    data = build_train_data(specs, seed=3, num_workers=workers)
    data.attach_text(build(table=data.table)[0])
    shown = []
    for epoch in (0, 1):
        for group in data.epoch(epoch):
            for batch in group.micro_batches:
                expected = fake_text_encoder(batch.captions)
                assert torch.equal(batch.text.hidden_BTD, expected.hidden_BTD.half())
                assert torch.equal(batch.text.pooled_BP, expected.pooled_BP.half())
                shown += batch.captions
    assert "" in shown and len(set(shown)) > 4


def test_stores_can_be_sent_to_other_processes(build):
    store, _ = build()
    assert torch.equal(pickle.loads(pickle.dumps(store)).get(1).pooled_BP, store.get(1).pooled_BP)


def test_another_run_with_other_encoders_is_noticed(folder, build):
    build()
    write_picture(folder / "q.png", 64, 64, caption="q", seed=5)

    def interfered(captions):
        build(text_encoder_id="theirs")
        return fake_text_encoder(captions)

    with pytest.raises(UserError, match="another run"):
        build(encode=interfered)

"""Cached captions: equal captions once, the empty one always, and every change noticed."""

import numpy as np
import pytest
import torch

from library.data.assemble import assemble
from library.data.text_caching import TextCacheOptions, build_text
from library.diffusion.conditioning import TextCond
from tests.data.fakes import fake_text_encoder
from tests.data.ranks import Ranks
from tests.data.specs import dataset, subset, write_folder, write_picture

NUM = 7


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


class Encoder:
    """Counts what it is asked to encode."""

    def __init__(self):
        self.captions = []

    def __call__(self, captions):
        self.captions += captions
        return fake_text_encoder(captions)


def build(folder, *, encode=None, subset_changes=None, **options):
    images, _ = assemble([dataset(subset(folder, **(subset_changes or {})))])
    options = TextCacheOptions(**({"text_encoder_id": "te", "width_1": 1, "to_disk": True} | options))
    store, report = build_text(images, encode or Encoder(), options=options)
    return store, report, images


def figures(report):
    return report.built, report.reused, len(report.stale), len(report.failed)


@pytest.mark.parametrize("to_disk", [False, True])
def test_rows_equal_a_fresh_encoding_of_the_processed_caption(folder, to_disk):
    store, report, images = build(
        folder, to_disk=to_disk, subset_changes={"caption_prefix": "p", "caption_suffix": "s"}, batch_size=2
    )
    assert figures(report) == (NUM, 0, 0, 0)
    for number, image in enumerate(images):
        expected = fake_text_encoder([f"p {image.record.caption} s"])
        row = store.get(number)
        assert torch.equal(row.hidden_BTD, expected.hidden_BTD) and torch.equal(row.pooled_BP, expected.pooled_BP)
    assert torch.equal(store.get(0, empty=True).pooled_BP, fake_text_encoder([""]).pooled_BP)


def test_the_second_pass_encodes_the_empty_caption_only(folder):
    build(folder)
    encode = Encoder()
    _, report, _ = build(folder, encode=encode)
    assert figures(report) == (0, NUM, 0, 0)
    assert encode.captions == [""]


@pytest.mark.parametrize("to_disk", [False, True])
def test_equal_captions_are_encoded_once(tmp_path, to_disk):
    for number in range(5):
        write_picture(tmp_path / f"{number}.png", 64, 64, caption="the same" if number else "another")
    encode = Encoder()
    store, report, images = build(tmp_path, encode=encode, to_disk=to_disk)
    assert sorted(encode.captions) == ["", "another", "the same"]
    assert figures(report) == (5 if to_disk else 2, 0, 0, 0)
    assert store.has(images.images).all()


def test_an_edited_caption_is_the_only_one_built_again(folder):
    build(folder)
    (folder / "p3.txt").write_text("something else", encoding="utf-8")
    encode = Encoder()
    _, report, _ = build(folder, encode=encode)
    assert figures(report) == (1, NUM - 1, 1, 0)
    assert report.stale[0].reason == "caption changed"
    assert encode.captions == ["", "something else"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text_encoder_id": "other"}, "text encoder changed"),
        ({"weighted": True}, "weighted captions changed"),
        ({"max_token_length": 150}, "max token length changed"),
        ({"subset_changes": {"caption_prefix": "p"}}, "caption changed"),
    ],
)
def test_whatever_the_encoding_depends_on_makes_it_stale(folder, changes, reason):
    build(folder)
    _, report, _ = build(folder, **changes)
    assert {stale.reason for stale in report.stale} == {reason}
    assert figures(report) == (NUM, 0, NUM, 0)


def test_files_that_are_trusted_are_of_the_length_that_the_run_wants(folder):
    def long(captions):
        encoded = fake_text_encoder(captions)
        return type(encoded)(encoded.hidden_BTD[:, :1].repeat(1, 152, 1), encoded.pooled_BP)

    build(folder)
    store, report, images = build(folder, encode=long, max_token_length=150, skip_check=True)
    assert {stale.reason for stale in report.stale} == {"max token length changed"}
    assert figures(report) == (NUM, 0, NUM, 0)
    assert store.get(int(images.images[0])).hidden_BTD.shape[1] == 152
    _, report, _ = build(folder, encode=long, max_token_length=150, skip_check=True, text_encoder_id="other")
    assert figures(report) == (0, NUM, 0, 0)


def test_caption_randomness_that_a_cache_can_hold_changes_nothing(folder):
    build(folder)
    _, report, _ = build(folder, subset_changes={"caption_dropout_rate": 0.5, "caption_dropout_every_n_epochs": 2})
    assert figures(report) == (0, NUM, 0, 0)


def test_sd_scripts_finds_what_it_expects_in_our_files(folder):
    def half(captions):
        return fake_text_encoder(captions).to(dtype=torch.float16)

    build(folder, encode=half)
    with np.load(folder / "p0_te_outputs.npz", allow_pickle=False) as file:
        assert file["hidden_state1"].shape == file["hidden_state2"].shape == (77, 1)
        assert file["pool2"].shape == (2,)
        assert {file[key].dtype for key in ("hidden_state1", "hidden_state2", "pool2")} == {np.dtype(np.float16)}


def test_files_of_sd_scripts_are_used(folder):
    for number in range(NUM):
        np.savez(
            folder / f"p{number}_te_outputs.npz",
            hidden_state1=np.full((77, 1), number, dtype=np.float16),
            hidden_state2=np.full((77, 1), -number, dtype=np.float16),
            pool2=np.full((2,), number, dtype=np.float16),
        )
    store, report, _ = build(folder)
    assert figures(report) == (0, NUM, 0, 0)
    row = store.get(3)
    assert row.hidden_BTD[0, 0].tolist() == [3.0, -3.0] and row.hidden_BTD.dtype == torch.float32


def test_cached_rows_can_enter_a_graph(folder):
    store, _, _ = build(folder, to_disk=False)
    weight = torch.ones(2, requires_grad=True)
    rows = TextCond.cat([store.get(0), store.empty])
    (rows.hidden_BTD * weight).sum().backward()
    assert weight.grad is not None


def test_a_name_shared_by_two_captions_gets_two_files(tmp_path):
    write_picture(tmp_path / "a.png", 64, 64, caption="x")
    plain, prefixed = subset(tmp_path), subset(tmp_path, caption_prefix="p")
    images, _ = assemble([dataset(plain), dataset(prefixed)])
    options = TextCacheOptions("te", 1, to_disk=True)
    for expected in ((2, 0, 0, 0), (0, 2, 0, 0)):
        store, report = build_text(images, Encoder(), options=options)
        assert figures(report) == expected
    sums = [store.get(image).pooled_BP.sum().item() for image in range(2)]
    assert sums == [fake_text_encoder([text]).pooled_BP.sum().item() for text in ("x", "p x")]


@pytest.mark.parametrize("to_disk", [False, True])
def test_two_ranks_share_the_work_and_both_have_everything(folder, to_disk, monkeypatch):
    encoders = [Encoder(), Encoder()]

    def work(rank):
        images, _ = assemble([dataset(subset(folder))])
        options = TextCacheOptions("te", 1, to_disk=to_disk, batch_size=2)
        return build_text(images, encoders[rank], options=options, rank=rank, world=2), images

    ((store_0, report_0), images), ((store_1, report_1), _) = Ranks(2, monkeypatch).run(work)
    assert report_0 == report_1 and figures(report_0) == (NUM, 0, 0, 0)
    assert sorted(caption for encode in encoders for caption in encode.captions if caption) == sorted(
        image.record.caption for image in images
    )
    assert all(len(encode.captions) > 1 and "" in encode.captions for encode in encoders)
    for image in range(NUM):
        assert torch.equal(store_0.get(image).pooled_BP, store_1.get(image).pooled_BP)

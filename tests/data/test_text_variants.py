"""Several wordings of a caption in a cache: which there are, how they are kept, and what makes them stale."""

import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.data.assemble import assemble
from library.data.cache_places import CachePlace
from library.data.captions import caption_variant, process_caption
from library.data.table import text_id
from library.data.text_caching import TextCacheOptions, build_text
from library.data.text_targets import caption_id
from tests.data.ranks import Ranks
from tests.data.specs import dataset, subset, write_folder, write_picture
from tests.data.variants import (
    MANY_TAGS,
    NUM,
    SHUFFLE,
    Encoder,
    build,
    digests,
    figures,
    same,
    variants,
    write_pictures,
)

tags = st.text("abcdefg ", min_size=1, max_size=6).map(str.strip).filter(bool)


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path)


@given(
    st.lists(tags, min_size=1, max_size=8),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([0.0, 0.4]),
    st.text("xyz/#", max_size=5),
    st.integers(0, 9),
)
def test_every_variant_is_a_wording_that_the_pipeline_can_make(parts, keep, shuffle, rate, key, number):
    settings = {"shuffle_caption": shuffle, "caption_tag_dropout_rate": rate, "keep_tokens": keep}
    spec = subset(**settings, caption_dropout_rate=1.0, secondary_separator=";")
    out = caption_variant(",".join(parts), spec, key=key, number=number)
    found = out.split(", ") if out else []
    if shuffle or rate:
        assert found[:keep] == parts[:keep]
        assert not Counter(found) - Counter(parts)
        if not rate:
            assert Counter(found) == Counter(parts)
        if not shuffle:
            rest = iter(parts)
            assert all(tag in rest for tag in found)
    else:
        assert out == ",".join(parts)


def test_a_variant_is_what_the_pipeline_makes_of_its_own_generator():
    text = "{red|blue|green} cat\nsecond {a|b} line; c, d"
    spec = subset(
        enable_wildcard=True,
        shuffle_caption=True,
        caption_tag_dropout_rate=0.3,
        caption_prefix="p,",
        caption_suffix=", s",
        secondary_separator=";",
        keep_tokens=1,
    )
    made = {caption_variant(text, spec, key="k", number=number) for number in range(60)}
    drawn = {process_caption(text, spec, rng=random.Random(seed), epoch=1) for seed in range(3000)}
    assert made <= drawn and len(made) > 20
    assert all(caption.startswith("p") for caption in made)


def test_variants_depend_on_the_record_and_the_number_alone():
    spec = subset(**SHUFFLE)
    first = [caption_variant(MANY_TAGS, spec, key="f/a.png", number=number) for number in range(6)]
    state = random.getstate()
    assert first == [caption_variant(MANY_TAGS, spec, key="f/a.png", number=number) for number in range(6)]
    assert random.getstate() == state
    assert first != [caption_variant(MANY_TAGS, spec, key="f/b.png", number=number) for number in range(6)]
    assert len(set(first)) > 3
    # Written down, because what lies on users' disks depends on it.
    assert first[:2] == ["kept, three, four, two, one, five", "kept, two, four, five, one, three"]


@pytest.mark.parametrize("to_disk", [False, True])
def test_rows_equal_fresh_encodings_of_the_variants(folder, to_disk):
    store, report, images = build(folder, to_disk=to_disk, batch_size=2)
    assert figures(report) == (NUM if to_disk else 3 * NUM, 0, 0, 0)
    assert store.has(images.images).all()
    for image, record in enumerate(map(images.record, range(NUM))):
        wordings = variants(record, 3)
        assert store.num_variants(image) == len(set(wordings)) == 3
        assert all(same(store.get(image, variant=number), text) for number, text in enumerate(wordings))
    assert same(store.get(0, empty=True), "")


@pytest.mark.parametrize("to_disk", [False, True])
def test_equal_wordings_are_encoded_and_kept_once(tmp_path, to_disk):
    for number in range(6):
        write_picture(tmp_path / f"{number}.png", 64, 64, caption="x, y")
    encode = Encoder()
    store, report, images = build(
        tmp_path, encode=encode, to_disk=to_disk, subset_changes={"keep_tokens": 0}, num_variants=16
    )
    wanted = {text for image in range(6) for text in variants(images.record(image), 16)}
    assert wanted == {"x, y", "y, x"}
    assert sorted(encode.captions) == ["", "x, y", "y, x"]
    assert figures(report)[0] == (6 if to_disk else 2)
    if to_disk:
        for image in range(6):
            with np.load(tmp_path / f"{image}_te_outputs.npz", allow_pickle=False) as file:
                texts = variants(images.record(image), 16)
                assert file["variant_index"].dtype == np.int32
                assert file["variant_index"].tolist() == [int(text != texts[0]) for text in texts]
                assert "pool2_v1" in file and "pool2_v2" not in file
    assert all(same(store.get(3, variant=k), text) for k, text in enumerate(variants(images.record(3), 16)))


def test_a_chunk_holds_whole_captions_and_a_batch_no_more_than_asked(folder):
    encode = Encoder()
    build(folder, encode=encode, num_variants=3, batch_size=6)
    assert encode.batches == [1, 6, 6, 6, 3]
    encode = Encoder()
    build(folder, encode=encode, num_variants=5, batch_size=2, text_encoder_id="other")
    assert encode.batches == [1] + [2, 2, 1] * NUM


def test_a_subset_with_one_wording_keeps_the_entries_it_has(folder, tmp_path):
    plain = write_folder(tmp_path / "plain")
    options = {"text_encoder_id": "te", "width_1": 1, "to_disk": True}
    alone, _ = assemble([dataset(subset(plain))])
    build_text(alone, digests, options=TextCacheOptions(**options))
    before = {path: path.read_bytes() for path in plain.glob("*.npz")}
    both, _ = assemble([dataset(subset(plain), subset(folder, **SHUFFLE))])
    store, report = build_text(both, digests, options=TextCacheOptions(**options, num_variants=4))
    assert figures(report) == (NUM, NUM, 0, 0)
    assert {path: path.read_bytes() for path in plain.glob("*.npz")} == before
    assert [store.num_variants(image) for image in range(2 * NUM)] == [1] * NUM + [4] * NUM


def test_the_second_pass_encodes_the_empty_caption_only(folder):
    build(folder)
    (folder / ".sdxl_text_index").unlink()
    for _ in range(2):
        encode = Encoder()
        _, report, _ = build(folder, encode=encode)
        assert figures(report) == (0, NUM, 0, 0) and encode.captions == [""]


def test_an_edited_caption_is_the_only_one_built_again(folder):
    build(folder)
    (folder / "p3.txt").write_text("something, else, entirely", encoding="utf-8")
    encode = Encoder()
    _, report, images = build(folder, encode=encode)
    assert figures(report) == (1, NUM - 1, 1, 0) and report.stale[0].reason == "caption changed"
    assert set(encode.captions) == {"", *variants(images.record(3), 3)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"subset_changes": {"keep_tokens": 2}}, "caption changed"),
        ({"subset_changes": {"caption_tag_dropout_rate": 0.5}}, "caption changed"),
        ({"subset_changes": {"caption_prefix": "p,"}}, "caption changed"),
        ({"num_variants": 4}, "number of caption variants changed"),
        ({"subset_changes": {"shuffle_caption": False}}, "number of caption variants changed"),
        ({"text_encoder_id": "other"}, "text encoder changed"),
        ({"max_token_length": 150}, "max token length changed"),
        ({"weighted": True}, "weighted captions changed"),
    ],
)
@pytest.mark.parametrize("is_indexed", [False, True])
def test_whatever_the_wordings_depend_on_makes_them_stale(folder, changes, reason, is_indexed):
    build(folder)
    if not is_indexed:
        (folder / ".sdxl_text_index").unlink()
    _, report, _ = build(folder, **changes)
    assert {stale.reason for stale in report.stale} == {reason}
    assert figures(report) == (NUM, 0, NUM, 0)


def test_a_file_of_more_variants_serves_a_run_that_wants_fewer(folder):
    build(folder, num_variants=5)
    encode = Encoder()
    store, report, images = build(folder, encode=encode, num_variants=2)
    assert figures(report) == (0, NUM, 0, 0) and encode.captions == [""]
    assert all(same(store.get(4, variant=k), text) for k, text in enumerate(variants(images.record(4), 2)))


def test_going_back_to_one_wording_leaves_no_variant_behind(folder):
    build(folder)
    build(folder, subset_changes={"shuffle_caption": False}, num_variants=1)
    with np.load(folder / "p0_te_outputs.npz", allow_pickle=False) as file:
        assert set(file) == {"hidden_state1", "hidden_state2", "pool2", "fingerprint", "fingerprint_crc"}


@pytest.mark.parametrize("skip_check", [False, True])
def test_a_file_of_sd_scripts_holds_one_caption_and_is_built_again(folder, skip_check):
    for number in range(NUM):
        arrays = {key: np.zeros((77, 1), np.float16) for key in ("hidden_state1", "hidden_state2")}
        np.savez(folder / f"p{number}_te_outputs.npz", **arrays, pool2=np.zeros(2, np.float16), t5_out=np.arange(3))
    _, report, images = build(folder, skip_check=skip_check)
    assert {stale.reason for stale in report.stale} == {"number of caption variants changed"}
    assert figures(report) == (NUM, 0, NUM, 0)
    with np.load(folder / "p0_te_outputs.npz", allow_pickle=False) as file:
        assert file["t5_out"].tolist() == [0, 1, 2]
        first = digests([variants(images.record(0), 1)[0]])
        assert np.array_equal(file["pool2"], first.pooled_BP[0]), "sd-scripts reads variant 0"
        assert file["hidden_state1"].shape == file["hidden_state2_v2"].shape == (77, 1)
    _, report, _ = build(folder, skip_check=skip_check)
    assert figures(report) == (0, NUM, 0, 0)


def test_a_file_is_the_same_on_any_number_of_ranks(folder, monkeypatch):
    build(folder, batch_size=4)
    alone = {path.name: path.read_bytes() for path in folder.glob("*.npz")}
    for path in [*folder.glob("*.npz"), folder / ".sdxl_text_index"]:
        path.unlink()

    def work(rank):
        images, _ = assemble([dataset(subset(folder, **SHUFFLE))])
        options = TextCacheOptions("te", 1, to_disk=True, num_variants=3, batch_size=4)
        return build_text(images, Encoder(), options=options, rank=rank, world=2)

    Ranks(2, monkeypatch).run(work)
    assert {path.name: path.read_bytes() for path in folder.glob("*.npz")} == alone


def test_a_token_warm_up_is_never_cached(folder):
    with pytest.raises(AssertionError, match="knows no step"):
        build(folder, subset_changes={"token_warmup_step": 5})


def test_one_folder_used_with_two_ways_of_shuffling_gets_two_files_an_image(folder):
    specs = [dataset(subset(folder, **SHUFFLE)), dataset(subset(folder, shuffle_caption=True, caption_prefix="p,"))]
    for expected in ((2 * NUM, 0, 0, 0), (0, 2 * NUM, 0, 0)):
        images, _ = assemble(specs)
        options = TextCacheOptions("te", 1, to_disk=True, num_variants=3)
        store, report = build_text(images, digests, options=options)
        assert figures(report) == expected
    for image in range(2 * NUM):
        texts = variants(images.record(image), 3)
        assert all(same(store.get(image, variant=k), text) for k, text in enumerate(texts))


def test_images_that_are_not_used_have_no_wordings(folder):
    images, _ = assemble([dataset(subset(folder, **SHUFFLE))])
    images.drop([images.paths.text(2), images.paths.text(0)])
    encode = Encoder()
    store, report = build_text(images, encode, options=TextCacheOptions("te", 1, num_variants=3))
    assert figures(report) == (3 * (NUM - 2), 0, 0, 0)
    assert store.has(np.arange(NUM)).tolist() == [number not in (0, 2) for number in range(NUM)]
    assert same(store.get(3, variant=2), variants(images.record(3), 3)[2])


def test_the_store_can_be_sent_to_a_worker_without_captions(folder):
    store, _, _ = build(folder)
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy.get(1, variant=2).pooled_BP, store.get(1, variant=2).pooled_BP)
    assert b"three" not in pickle.dumps(store)


def test_ids_tell_apart_what_is_encoded_differently(folder):
    assert caption_id("a", max_token_length=75, weighted=False) == text_id("\0".join(["a", "75", "0"]))
    settings = [(75, False), (150, False), (75, True)]
    assert len({caption_id("a", max_token_length=length, weighted=weighted) for length, weighted in settings}) == 3
    build(folder)
    with np.load(folder / "p1_te_outputs.npz", allow_pickle=False) as file:
        made_from = json.loads(str(file["fingerprint"]))
    images, _ = assemble([dataset(subset(folder, **SHUFFLE))])
    ids = [caption_id(text, max_token_length=75, weighted=False) for text in variants(images.record(1), 3)]
    assert made_from["captions"] == "".join(f"{number:016x}" for number in ids)


def test_a_packed_cache_keeps_every_distinct_wording_once(folder, tmp_path):
    place, encode = CachePlace("packed", tmp_path / "cache"), Encoder()
    store, report, images = build(folder, encode=encode, place=place)
    wordings = {image: variants(images.record(image), 3) for image in images.images.tolist()}
    distinct = {text for texts in wordings.values() for text in texts}
    assert figures(report) == (len(distinct), 0, 0, 0)
    assert sorted(encode.captions) == sorted(distinct | {""})
    for image, texts in wordings.items():
        for variant, text in enumerate(texts):
            row, expected = store.get(image, variant=variant), digests([text])
            torch.testing.assert_close(row.pooled_BP.float(), expected.pooled_BP, rtol=1e-3, atol=0)
    again = Encoder()
    _, report, _ = build(folder, encode=again, place=place)
    assert figures(report) == (0, len(distinct), 0, 0) and again.captions == []
    _, report, _ = build(folder, place=place, num_variants=2)
    assert figures(report)[0] == 0


def test_files_beside_the_images_serve_a_run_with_a_folder_of_its_own(folder, tmp_path):
    build(folder)
    place = CachePlace("npz", tmp_path / "cache")
    (folder / "p2.txt").write_text(f"{MANY_TAGS}, edited")
    store, report, images = build(folder, place=place)
    assert figures(report) == (1, NUM - 1, 0, 0)
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    for image in images.images.tolist():
        for variant, text in enumerate(variants(images.record(image), 3)):
            assert same(store.get(image, variant=variant), text)
    assert figures(build(folder, place=place)[1]) == (0, NUM, 0, 0)

"""Images held out of training: which they are, and that nothing of them is trained on."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.data.assemble import assemble
from library.data.buckets import Placement
from library.data.dataset import build_train_data
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.data.records import ImageRecord, PlacedImage, ScanReport, Skipped
from library.data.table import ImageTable
from library.data.text_caching import TextCacheOptions, build_text
from library.data.validation import hold_out
from library.sizes import Size
from tests.data.fakes import Counting, fake_text_encoder
from tests.data.specs import SIZES, dataset, subset, write_folder, write_picture

NUM = len(SIZES)
SQUARE = Placement(Size(64, 64), Size(64, 64), 0.0)


def held(names, *, share, seed=0, num_datasets=1, **changes):
    """The names that are held out of data sets which all use files of these names."""
    specs = [dataset(subset(num_repeats=3), validation_split=share, **changes) for _ in range(num_datasets)]
    images = [
        PlacedImage(ImageRecord(f"f/{name}", f"/f/{name}", Size(64, 64), "", spec.subsets[0], repeats=3), SQUARE, index)
        for index, spec in enumerate(specs)
        for name in names
    ]
    table = ImageTable(images)
    hold_out(table, specs, seed=seed, report=ScanReport())
    sides = [{table.keys[image] for image in table.part(validation=side).images} for side in (False, True)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {f"f/{name}" for name in names}
    for side in (False, True):
        part = table.part(validation=side)
        assert len(part.images) == num_datasets * len(sides[side]) == len(part.rows)
        assert set(part.repeats[part.images].tolist()) <= ({1} if side else {3})
    return {key.removeprefix("f/") for key in sides[1]}


NAMES = st.sets(st.integers(0, 999), min_size=1, max_size=40).map(lambda numbers: [str(n) for n in sorted(numbers)])


@given(NAMES, st.floats(0, 1), st.integers(0, 5), st.integers(1, 3))
def test_the_share_is_held_out_and_something_is_left(names, share, seed, num_datasets):
    found = held(names, share=share, seed=seed, num_datasets=num_datasets)
    assert len(found) == min(math.floor(len(names) * share + 0.5), len(names) - 1)


@given(NAMES, st.floats(0, 1), st.integers(0, 5), st.randoms())
def test_the_order_of_the_images_does_not_matter(names, share, seed, shuffler):
    other = list(names)
    shuffler.shuffle(other)
    assert held(names, share=share, seed=seed) == held(other, share=share, seed=seed)


@given(NAMES, NAMES, st.floats(0, 1))
def test_images_keep_their_side_when_others_are_added(names, more, share):
    """As far as the count allows: those that change side all change in one direction."""
    before = held(names, share=share)
    after = held(sorted({*names, *more}), share=share) & set(names)
    assert before <= after or after <= before


def test_half_is_rounded_up():
    assert len(held([str(n) for n in range(10)], share=0.15)) == 2
    assert len(held([str(n) for n in range(10)], share=0.25)) == 3
    assert len(held([str(n) for n in range(10)], share=0.04)) == 0


def test_the_seed_of_the_data_set_wins_over_that_of_the_run():
    names = [str(n) for n in range(30)]
    by_run = [held(names, share=0.3, seed=seed) for seed in range(4)]
    assert len({frozenset(found) for found in by_run}) == 4
    assert {frozenset(held(names, share=0.3, seed=s, validation_seed=2)) for s in range(4)} == {frozenset(by_run[2])}


# --- on files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


def keys(data):
    """Keys and repeats served in the first epoch."""
    groups = data.epoch(0)
    return sorted(key for group in groups for b in group.micro_batches for key in b.keys[: b.num_real])


def names(data):
    return {key.record for key in keys(data)}


def test_a_file_that_is_used_twice_is_on_one_side(folder):
    """In two subsets and two data sets, of which one asks for nothing."""
    specs = [
        dataset(subset(folder, num_repeats=2), subset(folder, caption_extension=".none"), validation_split=0.4),
        dataset(subset(folder), resolution=Size(96, 96)),
    ]
    data = build_train_data(specs, seed=3)
    train, validation = ({name.split("#")[0] for name in names(part)} for part in (data, data.validation))
    assert not train & validation and len(validation) == 3 and len(train | validation) == NUM
    assert len(keys(data.validation)) == 3 * 3 and len(keys(data)) == 4 * (2 + 1 + 1)


def test_regularisation_images_are_never_held_out(folder, tmp_path):
    reg = write_folder(tmp_path / "reg", sizes=[(64, 64)] * 9)
    specs = [dataset(subset(folder), subset(reg, is_reg=True), validation_split=0.4)]
    data = build_train_data(specs, seed=3)
    assert not any("reg/" in name for name in names(data.validation))
    served = keys(data)
    assert len([key for key in served if "reg/" in key.record]) == 4, "as many as there are images left to train on"
    twice = build_train_data(
        [dataset(subset(folder), subset(folder, is_reg=True, loss_weight=0.5), validation_split=0.4)], seed=3
    )
    assert names(twice.validation) == names(data.validation)
    assert not {name.split("#")[0] for name in names(twice)} & names(twice.validation)
    assert sum("also held out" in reason for _, reason in twice.summary().skipped) == 3


def test_a_validation_subset_is_never_trained_on(folder, tmp_path):
    other = write_folder(tmp_path / "other", sizes=SIZES[:3])
    data = build_train_data([dataset(subset(folder), subset(other, is_validation=True, num_repeats=5))], seed=3)
    assert names(data) == {f"pictures/p{n}.png" for n in range(NUM)}
    assert keys(data.validation) == [(f"other/p{n}.png", 0) for n in range(3)]
    assert data.summary().held_out == 3 and data.summary().images == NUM


def test_a_validation_data_set_may_have_a_resolution_of_its_own(folder, tmp_path):
    other = write_folder(tmp_path / "other", sizes=[(64, 64)])
    spec = dataset(subset(other, is_validation=True), resolution=Size(96, 96), batch_size=1)
    data = build_train_data([dataset(subset(folder)), spec], seed=3)
    ((batch,),) = (group.micro_batches for group in data.validation.epoch(0))
    assert batch.bucket == (96, 96)
    assert len(json.loads(data.ss_metadata()["ss_datasets"])) == 1


def test_images_of_a_metadata_file_are_held_out_too(folder, tmp_path):
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({f"p{n}.png": {"caption": "x"} for n in range(NUM)}))
    by_file = [dataset(subset(folder, metadata_file=str(meta)), validation_split=0.3)]
    by_folder = [dataset(subset(folder), validation_split=0.3)]
    one, two = (build_train_data(specs, seed=3) for specs in (by_file, by_folder))
    assert len(names(one.validation)) == 2 and names(one.validation) == names(two.validation)


RANDOM = {
    "flip_aug": True,
    "shuffle_caption": True,
    "caption_dropout_rate": 0.5,
    "caption_tag_dropout_rate": 0.5,
    "caption_dropout_every_n_epochs": 1,
    "token_warmup_step": 1000,
    "num_repeats": 3,
}


def test_held_out_images_are_served_as_they_are(folder):
    random = [dataset(subset(folder, random_crop=True, caption_prefix="of", **RANDOM), validation_split=0.6)]
    plain = [dataset(subset(folder, caption_prefix="of"), validation_split=0.6)]
    one, two = (build_train_data(specs, seed=3).validation for specs in (random, plain))
    for a, b in zip(one.epoch(0), two.epoch(0), strict=True):
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
            assert (x.keys, x.captions) == (y.keys, y.captions) and "of a, b" in x.captions[0]
            assert torch.equal(x.pixels_B3HW, y.pixels_B3HW) and torch.equal(x.sizes_B6, y.sizes_B6)


def test_ranks_agree_about_what_is_held_out(folder):
    specs = [dataset(subset(folder), validation_split=0.4)]
    alone = build_train_data(specs, seed=3)
    ranks = [build_train_data(specs, seed=3, world=2, rank=rank) for rank in range(2)]
    for pick in (lambda data: data, lambda data: data.validation):
        parts = [set(keys(pick(data))) for data in ranks]
        assert not parts[0] & parts[1] and parts[0] | parts[1] == set(keys(pick(alone)))


@pytest.mark.parametrize("to_disk", [False, True])
def test_caches_hold_both_sides(folder, to_disk):
    specs = [dataset(subset(folder, flip_aug=True), validation_split=0.4)]
    fresh, cached = (build_train_data(specs, seed=3) for _ in range(2))
    encode = Counting()
    options = LatentCacheOptions("v", to_disk=to_disk, batch_size=2)
    store, report = build_latents(cached.all_images, encode, options=options)
    text, _ = build_text(cached.all_images, fake_text_encoder, options=TextCacheOptions("t", 1, to_disk=to_disk))
    assert report.built == NUM and encode.images == NUM + 4, "what is held out needs no mirror images"
    cached.attach_latents(store)
    cached.attach_text(text)
    for part in (lambda data: data, lambda data: data.validation):
        assert keys(part(fresh)) == keys(part(cached))
    batch = next(iter(cached.validation.epoch(0))).micro_batches[0]
    assert batch.latents_B4hw is not None and batch.text is not None and batch.pixels_B3HW is None


def test_images_that_fail_leave_their_side(folder):
    data = build_train_data([dataset(subset(folder), validation_split=0.2)], seed=3)
    (victim,) = names(data.validation)
    other = sorted(names(data))[0]
    data.drop([Skipped(str(folder / other.split("/")[1]), "test")])
    assert other not in names(data) and names(data.validation) == {victim}
    data.drop([Skipped(str(folder / victim.split("/")[1]), "test")])
    assert data.validation is None and len(names(data)) == NUM - 2


def test_the_numbers_of_held_out_images_are_told_and_recorded(folder):
    data = build_train_data([dataset(subset(folder, num_repeats=2), validation_split=0.4)], seed=3)
    assert "3 images held out for validation" in data.summary().text()
    metadata = data.ss_metadata()
    assert (metadata["ss_num_validation_images"], metadata["ss_num_train_images"]) == ("3", "8")
    assert json.loads(metadata["ss_dataset_dirs"]) == {"pictures": {"n_repeats": 2, "img_count": 4}}
    (info,) = json.loads(metadata["ss_datasets"])
    assert info["num_train_images"] == 8 and info["subsets"][0]["img_count"] == 4
    assert sum(bucket["count"] for bucket in info["bucket_info"]["buckets"].values()) == 8
    without = build_train_data([dataset(subset(folder))], seed=3)
    assert without.validation is None and "validation" not in without.summary().text()
    few = build_train_data([dataset(subset(folder), validation_split=0.01)], seed=3)
    assert "too few for validation_split" in few.summary().text() and few.validation is None


def test_the_table_is_shared_and_rows_keep_their_numbers(folder, tmp_path):
    write_picture(tmp_path / "more" / "q.png", 64, 64)
    table, _ = assemble([dataset(subset(folder), subset(tmp_path / "more"), validation_split=0.5)], seed=1)
    train, validation = (table.part(validation=side) for side in (False, True))
    assert sorted([*train.rows, *validation.rows]) == table.rows.tolist() == list(range(NUM + 1))
    assert all(validation[row].record.subset.is_validation for row in validation.rows)
    assert not any(train[row].record.subset.is_validation for row in train.rows)
    train.drop([table.paths[int(validation.rows[0])]])
    assert len(validation.rows) == 3 and table.num_held_out == 3
    assert np.array_equal(train.images, np.flatnonzero(~table.is_validation))

"""Regularisation images: as many as training images, weighed by prior_loss_weight, counted apart."""

import json

import pytest

from library.data.assemble import balance
from library.data.dataset import build_train_data
from tests.data.specs import dataset, subset, write_folder


@pytest.mark.parametrize(
    ("num_train_images", "repeats", "expected"),
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [4, 4, 4], [4, 4, 4]),
        (5, [2, 2, 2, 2], [2, 2, 2]),
        (6, [1, 1, 3, 3], [1, 1, 3, 3]),
        (5, [1, 1, 3, 3], [1, 1, 3]),
        (7, [1, 3], [3, 4]),
        (1, [5, 5], [5]),
        (0, [1, 1], []),
        (3, [], []),
    ],
)
def test_regularisation_repeats(num_train_images, repeats, expected):
    assert balance(repeats, num_train_images=num_train_images) == expected + [0] * (len(repeats) - len(expected))


@pytest.mark.parametrize("num_train_images", range(1, 30))
@pytest.mark.parametrize("repeats", [[1, 1, 1], [2, 1, 4, 1, 1], [7]])
def test_regularisation_repeats_equal_the_loop_of_the_spec(num_train_images, repeats):
    counts, total, rounds = {}, 0, 0
    while total < num_train_images:
        for number, count in enumerate(repeats):
            added = count if rounds == 0 else 1
            counts[number] = counts.get(number, 0) + added
            total += added
            if total >= num_train_images:
                break
        rounds += 1
    expected = [counts.get(number, 0) for number in range(len(repeats))]
    assert balance(repeats, num_train_images=num_train_images) == expected


def build(tmp_path, *, num_train=3, num_reg=2, reg_repeats=1):
    train = write_folder(tmp_path / "2_cat", sizes=[(64, 64)] * num_train)
    reg = write_folder(tmp_path / "1_animal", sizes=[(64, 64)] * num_reg)
    parts = subset(train, num_repeats=2), subset(reg, num_repeats=reg_repeats, is_reg=True, loss_weight=0.25)
    return build_train_data([dataset(*parts, batch_size=4)], seed=1)


def test_an_epoch_holds_as_many_regularisation_images_with_their_weight(tmp_path):
    data = build(tmp_path)
    seen = []
    for group in data.epoch(0):
        for batch in group.micro_batches:
            seen += list(zip([key.record for key in batch.keys], batch.weight_B.tolist(), strict=True))
    weights = {"2_cat": 1.0, "1_animal": 0.25}
    assert len(seen) == 12
    assert sum(name.startswith("1_animal") for name, _ in seen) == 6
    assert all(weight == weights[name.split("/")[0]] for name, weight in seen)


def test_summary_and_metadata_count_them_apart(tmp_path):
    data = build(tmp_path)
    summary = data.summary()
    assert (summary.repeats, summary.num_train_images, summary.num_reg_images, summary.unused_reg) == (12, 6, 2, 0)
    assert "1_animal: 2 regularisation images, 6 samples per epoch" in summary.text()
    plain = data.ss_metadata(user_config=False)
    assert (plain["ss_num_train_images"], plain["ss_num_reg_images"]) == ("6", "2")
    assert json.loads(plain["ss_dataset_dirs"]) == {"2_cat": {"n_repeats": 2, "img_count": 3}}
    assert json.loads(plain["ss_reg_dataset_dirs"]) == {"1_animal": {"n_repeats": 1, "img_count": 2}}
    (info,) = json.loads(data.ss_metadata()["ss_datasets"])
    assert (info["num_train_images"], info["num_reg_images"]) == (6, 2)
    assert [sub["is_reg"] for sub in info["subsets"]] == [False, True]


def test_surplus_regularisation_images_are_told_and_counted_in_the_metadata(tmp_path):
    data = build(tmp_path, num_train=1, num_reg=4)
    assert len(data.records) == 3
    assert "2 regularisation images are not used" in data.summary().text()
    plain = data.ss_metadata(user_config=False)
    assert json.loads(plain["ss_reg_dataset_dirs"]) == {"1_animal": {"n_repeats": 1, "img_count": 4}}
    assert plain["ss_num_reg_images"] == "4"

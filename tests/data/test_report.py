"""What the user reads about the data, and what network files record of it."""

import json

from library.data.dataset import build_train_data
from library.sizes import Size
from tests.data.specs import dataset, subset, write_folder, write_picture


def build(tmp_path):
    folder = write_folder(tmp_path / "2_cat", sizes=[(64, 64), (64, 64), (96, 32)])
    write_picture(folder / "q.png", 64, 64)
    (folder / "broken.png").write_bytes(b"broken")
    spec = dataset(subset(folder, num_repeats=2, flip_aug=True), batch_size=2)
    return build_train_data([spec], seed=1, accumulation=2)


def test_the_summary_counts_and_names(tmp_path):
    summary = build(tmp_path).summary()
    assert (summary.images, summary.repeats) == (4, 8)
    assert summary.buckets == {Size(64, 64): 6, Size(96, 32): 2}
    assert summary.mean_ar_error == 0.0
    text = summary.text()
    assert "bucket 0: resolution (64, 64), count: 6" in text
    assert "bucket 1: resolution (96, 32), count: 2" in text
    assert "1 images have no caption" in text and "q.png" in text
    assert "1 images are left out" in text and "broken.png" in text


def test_long_lists_are_cut_short(tmp_path):
    for number in range(8):
        write_picture(tmp_path / f"{number}.png", 64, 64)
    text = build_train_data([dataset(subset(tmp_path))], seed=1).summary().text()
    assert "8 images have no caption" in text and "... and 3 more" in text
    assert "4.png" in text and "5.png" not in text


def test_metadata_with_a_dataset_file(tmp_path):
    metadata = build(tmp_path).ss_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ss_num_train_images"] == "8"
    assert metadata["ss_num_batches_per_epoch"] == "4"
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_cat": {"n_repeats": 2, "img_count": 4}}
    assert json.loads(metadata["ss_tag_frequency"]) == {"2_cat": {"a": 3, "b0": 1, "b1": 1, "b2": 1, "c": 3}}
    (info,) = json.loads(metadata["ss_datasets"])
    assert info["bucket_info"] == {
        "buckets": {"0": {"resolution": [64, 64], "count": 6}, "1": {"resolution": [96, 32], "count": 2}},
        "mean_img_ar_error": 0.0,
    }
    assert info["resolution"] == [64, 64] and info["batch_size_per_device"] == 2
    (sub,) = info["subsets"]
    assert (sub["img_count"], sub["num_repeats"], sub["flip_aug"], sub["image_dir"]) == (4, 2, True, "2_cat")


def test_metadata_without_a_dataset_file(tmp_path):
    metadata = build(tmp_path).ss_metadata(user_config=False)
    assert metadata["ss_resolution"] == "(64, 64)"
    assert metadata["ss_batch_size_per_device"] == "2" and metadata["ss_total_batch_size"] == "4"
    assert metadata["ss_flip_aug"] == "True" and metadata["ss_enable_bucket"] == "True"
    assert json.loads(metadata["ss_bucket_info"])["buckets"]["1"] == {"resolution": [96, 32], "count": 2}
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {}
    assert "ss_datasets" not in metadata


def test_without_buckets_there_is_no_bucket_info(tmp_path):
    write_picture(tmp_path / "a.png", 64, 64, caption="x")
    data = build_train_data([dataset(subset(tmp_path), enable_bucket=False)], seed=1)
    assert json.loads(data.ss_metadata(user_config=False)["ss_bucket_info"]) is None


def test_folders_of_one_name_are_told_apart_and_their_tags_counted_once(tmp_path):
    here, there = (write_folder(tmp_path / place / "cat", sizes=[(64, 64)]) for place in ("here", "there"))
    data = build_train_data([dataset(subset(here), subset(there)), dataset(subset(here))], seed=1)
    metadata = data.ss_metadata()
    assert list(json.loads(metadata["ss_dataset_dirs"])) == ["cat", "cat (2)", "cat (3)"]
    assert json.loads(metadata["ss_tag_frequency"]) == {"cat": {"a": 1, "b0": 1, "c": 1}}


def test_enlarged_and_cropped_images_are_counted_for_each_data_set(tmp_path):
    small = write_folder(tmp_path / "small", sizes=[(32, 32), (32, 32), (64, 64), (200, 32)])
    fitting = write_folder(tmp_path / "fitting", sizes=[(64, 64)])
    lines = build_train_data([dataset(subset(small)), dataset(subset(fitting))], seed=1).summary().text().splitlines()
    found = [line for line in lines if line.startswith("data set")]
    enlarged = "of 4 images 2 are enlarged (at most 2.00 times)"
    assert found == [f"data set 1: {enlarged} and 1 lose more than 20% of their pixels to the crop"]


def test_images_moved_by_a_limit_or_over_it_are_told_with_their_figures(tmp_path):
    folder = write_folder(tmp_path / "a", sizes=[(48, 48), (60, 60), *[(16, 16 + extra) for extra in range(6)]])
    data = build_train_data([dataset(subset(folder), bucket_max_upscale=1.1)], seed=1)
    text = data.summary().text()
    assert data.summary().buckets[Size(32, 32)] == 1
    assert "\n1 images have another bucket or resize than without bucket_max_upscale 1.1\n" in text
    assert "\n6 images stay over bucket_max_upscale 1.1: no bucket keeps it\n" in text
    assert f"\n  {folder / 'p2.png'}: 16x16 in bucket 64x64, 0.0% cropped, enlarged 4.00 times\n" in text
    assert "p6.png: " in text and "\n  ... and 1 more" in text


def test_nothing_is_said_about_images_that_fit(tmp_path):
    text = build(tmp_path).summary().text()
    assert "enlarged" not in text and "another bucket" not in text and "stay over" not in text

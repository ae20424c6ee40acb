"""Metadata files: which image a key names, what its caption is, and what a bad file costs."""

import json
import os

import pytest

from library.data.dataset import build_train_data
from library.data.records import ScanReport
from library.data.sources import folders, metadata_json
from library.data.sources.metadata_json import join_caption
from library.errors import UserError
from library.plugins import load_plugin
from library.sizes import Size
from tests.data.specs import dataset, subset, write_picture


def metadata(folder, content, *, name="meta.json"):
    path = folder / name
    lines = [json.dumps(line) for line in content] if name.endswith(".jsonl") else [json.dumps(content, indent=2)]
    text = "\n".join(lines)
    path.write_text(text, encoding="utf-8")
    return path


def scanned(path, image_dir="", **changes):
    report = ScanReport()
    return list(metadata_json.scan(subset(image_dir, metadata_file=str(path), **changes), report=report)), report


@pytest.fixture
def images(tmp_path):
    """A folder of pictures a.png, b.c.jpg, deep/d.webp."""
    for name in ("a.png", "b.c.jpg", "deep/d.webp"):
        write_picture(tmp_path / "imgs" / name, 50, 40)
    return tmp_path / "imgs"


def test_the_subset_names_its_source():
    assert load_plugin("library.data.sources", subset("x").source) is folders
    assert load_plugin("library.data.sources", subset("", metadata_file="m.json").source) is metadata_json


@pytest.mark.parametrize("name", ["meta.json", "meta.jsonl"])
def test_keys_are_absolute_relative_or_stems(tmp_path, images, name):
    keys = [str(images / "a.png"), "b.c", "deep/d"]
    content = {key: {"caption": f"c{number}"} for number, key in enumerate(keys)}
    if name.endswith("l"):
        content = [{"image_path": key} | values for key, values in content.items()]
    records, report = scanned(metadata(tmp_path, content, name=name), images, num_repeats=3)
    assert [record.key for record in records] == ["imgs/a.png", "imgs/b.c.jpg", "imgs/deep/d.webp"]
    assert [record.path for record in records] == [str(images / n) for n in ("a.png", "b.c.jpg", "deep/d.webp")]
    assert [record.caption for record in records] == ["c0", "c1", "c2"]
    assert {(record.size, record.repeats) for record in records} == {(Size(50, 40), 3)}
    assert report == ScanReport()


def test_image_size_saves_opening_the_image(tmp_path, images):
    (images / "a.png").write_bytes(b"not opened")
    entry = {"caption": "x", "image_size": [70, 30], "train_resolution": [64, 32], "other": 1}
    records, _ = scanned(metadata(tmp_path, {"a": entry}), images)
    assert records[0].size == Size(70, 30)
    del entry["image_size"]
    records, report = scanned(metadata(tmp_path, {"a": entry}), images)
    assert records == [] and report.skipped[0].path == str(images / "a.png")


@pytest.mark.parametrize(
    ("caption", "tags", "separator", "joined"),
    [
        ("a cat", "red, big", ",", "a cat,red, big"),
        ("a cat", "", ",", "a cat"),
        ("", "red", ",", "red"),
        ("", "", ",", ""),
        ("one\n\n two ", "red\nbig", ";", "one;red;big\ntwo;red;big"),
    ],
)
def test_caption_and_tags_become_one_text(caption, tags, separator, joined):
    assert join_caption(caption, tags, separator=separator) == joined


def test_images_that_cannot_be_used_are_left_out_with_the_reason(tmp_path, images):
    write_picture(images / "a.jpg", 8, 8)
    content = {"gone.png": {"caption": "x"}, "a": {}, "a.png": {"tags": "x"}, "deep/d": {}, "deep/d.webp": {}}
    records, report = scanned(metadata(tmp_path, content), images)
    assert [record.path for record in records] == [str(images / "a.png"), str(images / "deep" / "d.webp")]
    assert report.missing_captions == [str(images / "deep" / "d.webp")]
    reasons = [reason for _, reason in report.skipped]
    assert "is missing" in reasons[0]
    assert "2 images by one name: a.jpg, a.png" in reasons[1]
    assert "a second time" in reasons[2]


@pytest.mark.parametrize(
    ("name", "text", "what", "line"),
    [
        ("m.json", "", "names no image", 1),
        ("m.json", "{}", "names no image", 1),
        ("m.json", '{\n"a": }', "this is not JSON", 2),
        ("m.json", "[1]", "must hold an object", 1),
        ("m.json", '{"b": {},\n "é": {"caption": 3}}', "the caption of 'é' must be a text", 2),
        ("m.json", '{"b": {},\n "\\u00e9":\n 3}', "the entry of 'é' is not an object", 2),
        ("m.json", '{\n\n"a": {"image_size": [3]}}', "the image_size of 'a' must be two whole numbers", 3),
        ("m.json", '{"a": {"train_resolution": [0, 8]}}', "the train_resolution of 'a'", 1),
        ("m.jsonl", '{"image_path": "a"}\n{"image_path":\n', "this is not JSON", 2),
        ("m.jsonl", '\n{"caption": "a"}\n', "names no image", 2),
        ("m.jsonl", '\n\n{"image_path": "a", "tags": []}', "the tags of 'a' must be a text", 3),
    ],
)
def test_a_wrong_metadata_file_is_an_error_with_its_line(tmp_path, name, text, what, line):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        scanned(path, tmp_path)
    assert what in caught.value.problems[0].what
    assert caught.value.problems[0].where == f"{path} line {line}"


def test_a_missing_metadata_file_and_a_missing_image_dir_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        scanned(tmp_path / "m.json")
    path = metadata(tmp_path, {str(tmp_path / "x.png"): {}, "a.png": {}})
    with pytest.raises(UserError, match=r"'a\.png' is relative") as caught:
        scanned(path)
    assert caught.value.problems[0].where == f"{path} line 3"


def test_network_metadata_of_a_metadata_file(tmp_path, images):
    path = metadata(tmp_path, {"a": {"caption": "A cat, sitting", "tags": "Red, big"}, "b.c": {"caption": "x"}})
    data = build_train_data([dataset(subset(images, metadata_file=str(path), num_repeats=2))], seed=1)
    found = data.ss_metadata()
    assert json.loads(found["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 2, "img_count": 2}}
    assert json.loads(found["ss_tag_frequency"]) == {"meta.json": {"red": 1, "big": 1}}
    (info,) = json.loads(found["ss_datasets"])
    (sub,) = info["subsets"]
    assert (info["is_dreambooth"], sub["metadata_file"], sub["image_dir"]) == (False, "meta.json", "imgs")
    assert "class_tokens" not in sub and "is_reg" not in sub


def test_a_folder_is_listed_once(tmp_path, images, monkeypatch):
    listed = []
    scandir = metadata_json.os.scandir
    monkeypatch.setattr(metadata_json.os, "scandir", lambda path: listed.append(path) or scandir(path))
    scanned(metadata(tmp_path, {"a": {}, "b.c": {}, "deep/d": {}}), images)
    assert listed == [images, images / "deep"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "m.json",
            '{"a": {"caption": "1"}, "b.c": {"tags": "t", "caption": "x", "caption": "y"}, "a": {"caption": "2"}}',
        ),
        (
            "m.jsonl",
            '{"image_path": "a", "caption": "2"}\n{"image_path": "b.c", "tags": "t", "caption": "x", "caption": "y"}\n'
            '{"image_path": "a.png", "caption": "3"}',
        ),
    ],
)
def test_what_a_metadata_file_says_twice_is_reported(tmp_path, images, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    records, report = scanned(path, images)
    assert [(record.key, record.caption) for record in records] == [("imgs/a.png", "2"), ("imgs/b.c.jpg", "y,t")]
    reasons = dict(report.skipped)
    assert "caption more than once; the last one counts" in reasons[str(images / "b.c.jpg")]
    again = "more than once; the last entry counts" if name == "m.json" else "a second time"
    assert again in reasons[str(images / "a.png")]
    assert len(report.skipped) == 2


def test_keys_with_dots_and_double_slashes_name_the_same_files(tmp_path, images):
    keys = ["./a.png", "deep/../b.c", f"{images}//deep/d.webp"]
    path = metadata(tmp_path, {key: {"caption": "x"} for key in keys})
    records, report = scanned(path, images)
    assert [record.key for record in records] == ["imgs/a.png", "imgs/b.c.jpg", "imgs/deep/d.webp"]
    assert [record.path for record in records] == [str(images / n) for n in ("a.png", "b.c.jpg", "deep/d.webp")]
    assert report == ScanReport()


def test_a_record_tells_the_bytes_and_the_time_of_its_file(tmp_path, images):
    content = {"a": {"caption": "x", "image_size": [50, 40]}, "b.c": {"caption": "x"}}
    for record in scanned(metadata(tmp_path, content), images)[0]:
        stat = os.stat(record.path)
        assert record.stamp == (stat.st_size, stat.st_mtime_ns)

"""Image folders: what is found, where captions come from, and what a bad file costs."""

import os
import zlib

import pytest
from PIL import Image

from library.data import folder_listing
from library.data.assemble import assemble
from library.data.records import ScanReport
from library.data.sources.folders import scan
from library.errors import UserError
from library.sizes import Size
from tests.data.specs import dataset, subset, write_picture


def scanned(folder, **changes):
    report = ScanReport()
    return list(scan(subset(folder, **changes), report=report)), report


def test_images_come_sorted_with_size_caption_and_repeats(tmp_path):
    write_picture(tmp_path / "b.png", 50, 40, caption="second")
    write_picture(tmp_path / "a.JPG", 30, 20, caption="first\nnot this")
    write_picture(tmp_path / "deeper" / "c.png", 8, 8)
    (tmp_path / "notes.md").write_text("not an image", encoding="utf-8")
    (tmp_path / "._a.png").write_bytes(b"resource fork")
    records, report = scanned(tmp_path, num_repeats=3)
    assert [record.key for record in records] == [f"{tmp_path.name}/a.JPG", f"{tmp_path.name}/b.png"]
    assert [record.path for record in records] == [str(tmp_path / "a.JPG"), str(tmp_path / "b.png")]
    assert [record.size for record in records] == [Size(30, 20), Size(50, 40)]
    assert [record.caption for record in records] == ["first", "second"]
    assert [record.repeats for record in records] == [3, 3]
    assert report == ScanReport()


def test_keys_do_not_depend_on_where_the_folder_lies(tmp_path):
    keys = []
    for place in ("here", "there"):
        write_picture(tmp_path / place / "10_cat" / "a.png", 8, 8, caption="x")
        keys.append(scanned(tmp_path / place / "10_cat")[0][0].key)
    assert keys == ["10_cat/a.png", "10_cat/a.png"]


def test_one_key_is_used_once(tmp_path):
    for place in ("here", "there"):
        write_picture(tmp_path / place / "cat" / "a.png", 64, 64, caption="x")
    here, there = (subset(tmp_path / place / "cat") for place in ("here", "there"))
    images, _ = assemble([dataset(here, there), dataset(here)])
    assert [image.record.key for image in images] == ["cat/a.png", "cat/a.png#2", "cat/a.png#3"]
    assert [image.dataset for image in images] == [0, 0, 1]


def test_a_picture_is_as_large_as_it_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert scanned(tmp_path, class_tokens="")[0][0].size == (20, 60)


def test_captions_fall_back_to_class_tokens_and_then_to_nothing(tmp_path):
    write_picture(tmp_path / "a.png", 8, 8)
    records, report = scanned(tmp_path, class_tokens="zxq cat")
    assert records[0].caption == "zxq cat" and report.missing_captions == []
    records, report = scanned(tmp_path)
    assert records[0].caption == "" and report.missing_captions == [str(tmp_path / "a.png")]


def test_an_empty_caption_file_beats_the_class_tokens(tmp_path):
    write_picture(tmp_path / "a.png", 8, 8, caption=" \n")
    records, report = scanned(tmp_path, class_tokens="cat")
    assert records[0].caption == "" and report.missing_captions == []


def test_face_numbers_are_left_out_of_the_caption_name(tmp_path):
    write_picture(tmp_path / "my_cat_10_20_30_40.png", 8, 8)
    (tmp_path / "my_cat.txt").write_text("a cat", encoding="utf-8")
    assert scanned(tmp_path)[0][0].caption == "a cat"
    (tmp_path / "my_cat_10_20_30_40.txt").write_text("this cat", encoding="utf-8")
    assert scanned(tmp_path)[0][0].caption == "this cat"


def test_the_caption_extension_is_used(tmp_path):
    write_picture(tmp_path / "a.png", 8, 8, caption="wrong")
    (tmp_path / "a.tags").write_text("right", encoding="utf-8")
    assert scanned(tmp_path, caption_extension=".tags")[0][0].caption == "right"


def test_a_byte_order_mark_is_no_part_of_the_caption(tmp_path):
    write_picture(tmp_path / "a.png", 8, 8)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat")
    assert scanned(tmp_path)[0][0].caption == "a cat"


def test_bad_files_cost_one_image_each(tmp_path):
    write_picture(tmp_path / "good.png", 8, 8, caption="fine")
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    write_picture(tmp_path / "latin.png", 8, 8)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    records, report = scanned(tmp_path)
    assert [record.caption for record in records] == ["fine"]
    reasons = {path.rsplit("/", 1)[1]: reason for path, reason in report.skipped}
    assert set(reasons) == {"broken.png", "empty.png", "latin.png"}
    assert "not UTF-8" in reasons["latin.png"] and "byte 3" in reasons["latin.png"]


def test_a_missing_or_empty_folder_is_named(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError) as caught:
            scanned(folder)
        assert caught.value.problems[0].where == str(folder)


def test_an_image_too_narrow_for_any_bucket_is_left_out(tmp_path):
    write_picture(tmp_path / "a.png", 64, 64, caption="x")
    write_picture(tmp_path / "thin.png", 200, 10, caption="x")
    images, report = assemble([dataset(subset(tmp_path), bucket_no_upscale=True)])
    assert len(images) == 1
    assert report.skipped[0].path.endswith("thin.png")
    assert "bucket_reso_steps" in report.skipped[0].reason


def test_a_resolution_without_buckets_must_fit_the_model(tmp_path):
    write_picture(tmp_path / "a.png", 64, 64, caption="x")
    with pytest.raises(UserError, match="40x64 is not a multiple of 32"):
        assemble([dataset(subset(tmp_path), enable_bucket=False, resolution=Size(40, 64))])


def test_with_wildcards_every_line_that_is_not_empty_is_kept(tmp_path):
    write_picture(tmp_path / "a.png", 8, 8, caption="\n first \n\n second\n")
    assert scanned(tmp_path, enable_wildcard=True)[0][0].caption == "first\nsecond"
    assert scanned(tmp_path)[0][0].caption == "first"


def test_a_link_is_followed_and_one_that_leads_nowhere_is_reported(tmp_path):
    write_picture(tmp_path / "elsewhere" / "x.png", 8, 8)
    folder = tmp_path / "imgs"
    write_picture(folder / "a.png", 8, 8, caption="x")
    (folder / "b.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    (folder / "c.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "d.png").mkdir()
    records, report = scanned(folder, class_tokens="")
    assert [record.path for record in records] == [str(folder / "a.png"), str(folder / "b.png")]
    assert report.skipped == [(str(folder / "c.png"), "the link leads to no file")]


def test_names_of_every_kind_find_their_captions(tmp_path):
    names = ["a b.png", "ü.x.PNG", "cat_0100x0200_sdxl.png", "-.png", "日本.jpg", "a.png.png"]
    for name in names:
        write_picture(tmp_path / name, 8, 8)
        (tmp_path / (name.rsplit(".", 1)[0] + ".txt")).write_text(name, encoding="utf-8")
    records, report = scanned(tmp_path)
    assert [record.caption for record in records] == sorted(names) and report == ScanReport()


def test_a_folder_named_relative_to_the_working_folder_gives_the_same_paths(tmp_path, monkeypatch):
    write_picture(tmp_path / "imgs" / "a.png", 8, 8, caption="x")
    monkeypatch.chdir(tmp_path)
    assert [record.path for record in scanned("imgs")[0]] == [os.path.join("imgs", "a.png")]
    monkeypatch.chdir(tmp_path / "imgs")
    assert [record.path for record in scanned(".")[0]] == ["a.png"]


def test_truncated_animated_and_enormous_pictures(tmp_path):
    write_picture(tmp_path / "cut.png", 64, 64, caption="x")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    header = bytearray(data)
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(header)
    records, report = scanned(tmp_path, class_tokens="")
    assert [(record.key.split("/")[1], record.size) for record in records] == [
        ("cut.png", (64, 64)),
        ("moving.webp", (20, 10)),
    ]
    assert [path for path, _ in report.skipped] == [str(tmp_path / "huge.png")]
    assert "megapixels" in report.skipped[0].reason


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder_listing.os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot be listed") as caught:
        scanned(tmp_path)
    assert caught.value.problems[0].where == str(tmp_path)

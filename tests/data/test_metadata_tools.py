"""The metadata tools: sd-scripts' arguments in, its JSON out."""

import json

import pytest

from library.data.metadata_tools import clean_caption, clean_tags
from tests.data.specs import write_picture
from tools import clean_captions_and_tags, merge_captions_to_metadata, merge_dd_tags_to_metadata


@pytest.fixture
def images(tmp_path):
    """Two captioned and tagged pictures, one of them in a sub-folder."""
    for name, caption in (("b.png", "\n a café\nby night \n"), ("deep/a.jpg", "a dog")):
        path = write_picture(tmp_path / "imgs" / name, 8, 8, caption=f"1girl, {name[-5]}\n")
        path.with_suffix(".caption").write_text(caption, encoding="utf-8")
    return tmp_path / "imgs"


def test_captions_and_tags_are_merged_under_stems(tmp_path, images):
    out = tmp_path / "meta.json"
    assert merge_captions_to_metadata.main([str(images), str(out)]) == 0
    assert out.read_text(encoding="utf-8") == json.dumps({"b": {"caption": "a café\nby night"}}, indent=2)
    assert merge_dd_tags_to_metadata.main([str(images), str(out)]) == 0
    assert json.loads(out.read_text()) == {"b": {"caption": "a café\nby night", "tags": "1girl, b"}}


def test_full_paths_of_sub_folders_extend_another_file(tmp_path, images):
    first, out = tmp_path / "first.json", tmp_path / "out.json"
    first.write_text('{"x": {"image_size": [8, 8]}}', encoding="utf-8")
    flags = ["--full_path", "--recursive", "--in_json", str(first), "--caption_extention", "txt"]
    assert merge_captions_to_metadata.main([str(images), str(out), *flags]) == 0
    assert json.loads(out.read_text()) == {
        "x": {"image_size": [8, 8]},
        str(images / "b.png"): {"caption": "1girl, b"},
        str(images / "deep" / "a.jpg"): {"caption": "1girl, a"},
    }
    assert json.loads(first.read_text()) == {"x": {"image_size": [8, 8]}}


def test_images_with_one_stem_are_told(tmp_path, images, capsys):
    write_picture(images / "b.jpg", 8, 8)
    assert merge_dd_tags_to_metadata.main([str(images), str(tmp_path / "m.json")]) == 0
    assert "1 names stand for several images (use --full_path): b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--recursive"], "--recursive needs --full_path"),
        (["--in_json", "nowhere.json"], "the metadata file does not exist"),
        (["--caption_extension", ".none"], "1 of 1 images have no .none file"),
    ],
)
def test_wrong_arguments_are_sentences_and_write_nothing(tmp_path, images, capsys, flags, what):
    out = tmp_path / "m.json"
    assert merge_captions_to_metadata.main([str(images), str(out), *flags]) == 2
    assert what in capsys.readouterr().err
    assert not out.exists()


def test_wrong_folders_and_files_are_sentences(tmp_path, images, capsys):
    out = tmp_path / "m.json"
    (tmp_path / "empty").mkdir()
    for folder, what in (("nowhere", "does not exist"), ("empty", "holds no image")):
        assert merge_captions_to_metadata.main([str(tmp_path / folder), str(out)]) == 2
        assert what in capsys.readouterr().err
    out.write_text('{"b":\n 3}', encoding="utf-8")
    assert merge_captions_to_metadata.main([str(images), str(out)]) == 2
    assert f"{out} line 1" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == '{"b":\n 3}'
    (images / "b.caption").write_bytes(b"caf\xe9")
    assert merge_captions_to_metadata.main([str(images), str(tmp_path / "n.json")]) == 2
    assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tags", "cleaned"),
    [
        ("long_hair, ^_^, blue_eyes", "long hair, ^_^, blue eyes"),
        ("1girl, hat, rating:safe, more", "1girl, hat"),
        ("1girl, long hair, short hair", "1girl, long hair, short hair"),
        ("2girls, long hair, short hair, hat", "2girls, hat"),
        ("2girls, long hair, red hair", "2girls, long hair, red hair"),
        ("2girls, long hair, red hair, blue hair", "2girls, long hair"),
        ("2boys, bob cut, hime cut, red eyes, blue eyes", "2boys"),
        ("2girls, long sleeves, sleeveless, red eyes", "2girls, red eyes"),
        ("2girls, ponytail, side braid, two side up", "2girls"),
        ("shirt, white shirt, hair ornament, frog hair ornament", "white shirt, frog hair ornament"),
        ("shirt, t-shirt", "shirt, t-shirt"),
        ("", ""),
    ],
)
def test_tags_are_cleaned(tags, cleaned):
    assert clean_tags(tags) == cleaned


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a young young woman and two women", "a girl and two girls"),
        ("an anime anime anime character", "an girl"),
        ("a cartoon female with people", "a girl with girls"),
        ("a cartoon image of a person", "an image of a girl"),
        ("an anime cartoon image", "an image"),
        ("a cartoon anime drawing", "a drawing"),
        ("female woman", "girl"),
        ("a red car", "a red car"),
    ],
)
def test_captions_are_cleaned(caption, cleaned):
    assert clean_caption(caption) == cleaned


@pytest.mark.parametrize("before", [[], ["images"]])
def test_a_file_is_cleaned_and_what_is_missing_is_told(tmp_path, capsys, before):
    source, out = tmp_path / "in.json", tmp_path / "out.json"
    content = {"a": {"caption": "a woman", "tags": "blue_hat"}, "b": {"caption": "x", "image_size": [1, 2]}, "c": {}}
    source.write_text(json.dumps(content), encoding="utf-8")
    assert clean_captions_and_tags.main([*before, str(source), str(out)]) == 0
    content["a"] = {"caption": "a girl", "tags": "blue hat"}
    assert out.read_text(encoding="utf-8") == json.dumps(content, indent=2)
    errors = capsys.readouterr().err
    assert "2 images have no tags: b, c" in errors and "1 images have no caption: c" in errors
    assert clean_captions_and_tags.main([str(tmp_path / "none.json"), str(out)]) == 2
    assert "does not exist" in capsys.readouterr().err

"""What an entry was made from, and what is said to have changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from library.io import fingerprint as fp
from library.sizes import Size

LATENT = {
    "image": fp.ImageStamp(1000, 5, "aa"),
    "bucket": Size(64, 32),
    "resized": Size(70, 32),
    "crop": (3, 0),
    "interpolation": None,
    "vae_id": "v1",
}
TEXT = {"caption": "a cat", "text_encoder_id": "t1", "max_token_length": 75, "weighted": False}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ()),
        ({"image": fp.ImageStamp(1001, 5)}, ("image changed",)),
        ({"bucket": Size(32, 64)}, ("bucket changed",)),
        ({"resized": Size(71, 32)}, ("resized size changed",)),
        ({"crop": (0, 3)}, ("crop changed",)),
        ({"interpolation": "area"}, ("resize interpolation changed",)),
        ({"vae_id": "v2"}, ("VAE changed",)),
        ({"version": 99}, ("format version changed",)),
        ({"vae_id": "v2", "bucket": Size(8, 8)}, ("bucket changed", "VAE changed")),
    ],
)
def test_every_ingredient_of_a_latent_is_noticed_by_name(change: dict, words: tuple[str, ...]) -> None:
    assert fp.changes(fp.latent_fingerprint(**LATENT), fp.latent_fingerprint(**LATENT | change)) == words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ()),
        ({"caption": "a cat "}, ("caption changed",)),
        ({"text_encoder_id": "t2"}, ("text encoder changed",)),
        ({"max_token_length": 150}, ("max token length changed",)),
        ({"weighted": True}, ("weighted captions changed",)),
        ({"version": 99}, ("format version changed",)),
    ],
)
def test_every_ingredient_of_encoded_text_is_noticed_by_name(change: dict, words: tuple[str, ...]) -> None:
    assert fp.changes(fp.text_fingerprint(**TEXT), fp.text_fingerprint(**TEXT | change)) == words


def test_a_fingerprint_is_json_and_does_not_hold_the_caption() -> None:
    text = fp.text_fingerprint(**TEXT)
    assert json.loads(text)["weighted"] is False and "cat" not in text


def test_a_caption_with_half_a_surrogate_can_be_described() -> None:
    assert fp.text_fingerprint(**TEXT | {"caption": "a\ud800b"}) != fp.text_fingerprint(**TEXT)


@pytest.mark.parametrize("stored", ["", "[]", "3", "null", "{}", '{"image":[1]}', '{"image":"x"}', "\x00"])
def test_an_unreadable_or_older_fingerprint_is_a_change_and_not_a_crash(stored: str) -> None:
    assert fp.changes(stored, fp.latent_fingerprint(**LATENT))


def _pair(path: Path, hash_stored: bool = True) -> str:
    return fp.latent_fingerprint(**LATENT | {"image": fp.image_stamp(path, with_hash=hash_stored)})


def test_a_touched_image_is_still_the_same_but_an_edited_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"0123456789")
    os.utime(path, ns=(1, 1))
    stored, unhashed = _pair(path), _pair(path, hash_stored=False)
    assert fp.changes(stored, _pair(path, hash_stored=False)) == ()

    os.utime(path, ns=(2, 2))
    touched = _pair(path, hash_stored=False)
    assert fp.changes(stored, touched) == ("image changed",)  # nothing to compare the content with
    assert fp.changes(stored, touched, image_path=path) == ()
    assert fp.changes(stored, _pair(path)) == ()
    assert fp.changes(unhashed, touched, image_path=path) == ("image changed",)
    assert fp.changes(stored, touched, image_path=tmp_path / "gone.png") == ("image changed",)

    path.write_bytes(b"012345678X")
    assert fp.changes(stored, _pair(path, hash_stored=False), image_path=path) == ("image changed",)
    path.write_bytes(b"0123456789+")
    assert fp.changes(stored, _pair(path, hash_stored=False), image_path=path) == ("image changed",)


def test_a_good_entry_is_recognised_without_reading_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"0123456789")
    stored = _pair(path)
    monkeypatch.setattr(fp, "content_hash", lambda path: pytest.fail("the image was read"))
    assert fp.changes(stored, _pair(path, hash_stored=False), image_path=path) == ()


def _wordings(*ids: int, **changed: object) -> str:
    parts = {"text_encoder_id": "t", "max_token_length": 75, "weighted": False}
    return fp.variants_fingerprint(caption_ids=ids, **parts | changed)


def test_wordings_are_described_by_a_longer_list_that_begins_with_them() -> None:
    assert fp.changes(_wordings(1, 2, 3), _wordings(1, 2, 3)) == ()
    assert fp.changes(_wordings(1, 2, 3), _wordings(1, 2)) == ()
    assert fp.changes(_wordings(1, 2), _wordings(1, 2, 3)) == ("number of caption variants changed",)
    assert fp.changes(_wordings(1, 2, 3), _wordings(1, 3)) == ("caption changed",)
    assert fp.changes(_wordings(1, 2, 3), _wordings(1, 2, text_encoder_id="u")) == ("text encoder changed",)
    # The ids follow the length and the weights, so those are the reason.
    assert fp.changes(_wordings(1, 2), _wordings(5, 6, max_token_length=150)) == ("max token length changed",)


def test_one_wording_and_several_are_different_things() -> None:
    one = fp.text_fingerprint(caption="a", text_encoder_id="t", max_token_length=75, weighted=False)
    for stored, expected in ((one, _wordings(1, 2)), (_wordings(1, 2), one)):
        assert fp.changes(stored, expected) == ("number of caption variants changed",)

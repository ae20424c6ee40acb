"""Text caches: sd-scripts' format to the letter, and stale captions noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.io import fingerprint as fp
from library.io import text_cache
from library.io.text_cache import TextEntry, text_cache_path

KEYS = ("hidden_state1", "hidden_state2", "pool2")


def _fingerprint(**changed: object) -> str:
    parts = {"caption": "a cat", "text_encoder_id": "t", "max_token_length": 75, "weighted": False}
    return fp.text_fingerprint(**parts | changed)


def _entry(dtype: torch.dtype = torch.float32, tokens: int = 77) -> TextEntry:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, 768), (tokens, 1280), (1280,))
    return TextEntry(*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cat_te_outputs.npz"


def test_names_follow_the_format() -> None:
    assert text_cache_path("dir/a.b.jpg") == Path("dir/a.b_te_outputs.npz")


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float32, "float32"), (torch.float16, "float16"), (torch.bfloat16, "float32"), (torch.float64, "float32")],
)
def test_a_plain_numpy_reader_finds_keys_dtypes_and_shapes_of_the_format(path: Path, dtype, stored: str) -> None:
    entry = _entry(dtype, tokens=152)
    text_cache.write(path, entry, _fingerprint())
    with np.load(path, allow_pickle=False) as archive:
        assert {key: archive[key].shape for key in KEYS} == {
            "hidden_state1": (152, 768),
            "hidden_state2": (152, 1280),
            "pool2": (1280,),
        }
        assert {archive[key].dtype.name for key in KEYS} == {stored}
        for key in KEYS:
            assert np.array_equal(archive[key], getattr(entry, key).float().numpy().astype(stored))


def test_reading_gives_back_what_was_written(path: Path) -> None:
    text_cache.write(path, _entry(torch.float16), _fingerprint())
    read = text_cache.read(path)
    assert all(torch.equal(getattr(read, key), getattr(_entry(torch.float16), key)) for key in KEYS)
    assert read.fingerprint == _fingerprint()
    assert text_cache.check(path, _fingerprint(), num_tokens=77) == "valid"


def test_a_changed_caption_is_stale_and_said(path: Path) -> None:
    text_cache.write(path, _entry(), _fingerprint())
    assert text_cache.inspect(path, _fingerprint(caption="a dog")) == ("stale", ("caption changed",))
    assert text_cache.inspect(path, _fingerprint(text_encoder_id="u")) == ("stale", ("text encoder changed",))


def test_another_length_is_stale_whoever_wrote_it(path: Path) -> None:
    np.savez(
        path, **{key: np.zeros(shape, np.float32) for key, shape in zip(KEYS, ((77, 8), (77, 8), (8,)), strict=True)}
    )
    assert text_cache.check(path, _fingerprint(), num_tokens=77) == "foreign"
    assert text_cache.inspect(path, _fingerprint(), num_tokens=152) == ("stale", ("max token length changed",))


def test_an_entry_rewritten_in_place_by_another_program_is_foreign(path: Path) -> None:
    text_cache.write(path, _entry(), _fingerprint())
    with np.load(path) as archive:
        kept = dict(archive)
    np.savez(path, **kept | {"pool2": kept["pool2"] + 1})
    assert text_cache.check(path, _fingerprint()) == "foreign"


def test_other_programs_keys_stay(path: Path) -> None:
    np.savez(path, t5_out=np.arange(3), pool2=np.zeros(1280))
    text_cache.write(path, _entry(), _fingerprint())
    with np.load(path) as archive:
        assert archive["t5_out"].tolist() == [0, 1, 2] and np.array_equal(archive["pool2"], _entry().pool2.numpy())


def test_incomplete_broken_and_missing_files_are_told_apart(path: Path) -> None:
    assert text_cache.check(path, _fingerprint()) == "missing"
    np.savez(path, hidden_state1=np.zeros((77, 8)))
    assert text_cache.inspect(path, _fingerprint()) == ("stale", ("no hidden_state2", "no pool2"))
    with pytest.raises(UserError, match="lacks hidden_state2, pool2"):
        text_cache.read(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    assert text_cache.check(path, _fingerprint()) == "broken"
    with pytest.raises(UserError, match="cannot be read"):
        text_cache.read(path)


def _variants(path: Path, ids: tuple[int, ...] = (1, 2, 1, 3), **changed: object) -> str:
    """Write a file of four wordings in three rows; its fingerprint."""
    parts = {"text_encoder_id": "t", "max_token_length": 75, "weighted": False}
    made_from = fp.variants_fingerprint(caption_ids=ids, **parts | changed)
    rows = [TextEntry(*(getattr(_entry(), key) + row for key in KEYS)) for row in range(3)]
    text_cache.write(path, rows[0], made_from, others=rows[1:], variant_index=[0, 1, 0, 2])
    return made_from


def test_wordings_are_read_one_by_one_and_the_first_by_sd_scripts(path: Path) -> None:
    made_from = _variants(path)
    assert text_cache.inspect(path, made_from, num_tokens=77, variants=4) == ("valid", ())
    assert text_cache.inspect_contents(path, num_tokens=77, variants=4) == ("valid", ())
    fewer = ("stale", ("number of caption variants changed",))
    assert text_cache.inspect_contents(path, num_tokens=77, variants=5) == fewer
    for variant, row in enumerate([0, 1, 0, 2]):
        read = text_cache.read(path, variant)
        assert all(torch.equal(getattr(read, key), getattr(_entry(), key) + row) for key in KEYS)
    with np.load(path, allow_pickle=False) as archive:
        assert np.array_equal(archive["pool2"], _entry().pool2.numpy())
        assert archive["variant_index"].tolist() == [0, 1, 0, 2] and archive["variant_index"].dtype == np.int32
        assert archive["hidden_state2_v2"].shape == (77, 1280)
    with pytest.raises(UserError, match="holds 4 variants of its caption and not number 4"):
        text_cache.read(path, 4)


def test_reading_one_wording_looks_at_no_other(path: Path) -> None:
    _variants(path)
    raw = bytearray(path.read_bytes())
    with np.load(path) as archive:
        needle = archive["hidden_state1_v1"].tobytes()[:64]
    raw[raw.index(needle)] ^= 1
    path.write_bytes(raw)
    text_cache.read(path, 3)
    with pytest.raises(UserError, match="cannot be read"):
        text_cache.read(path, 1)


def test_a_shorter_list_of_wordings_replaces_the_longer_one_whole(path: Path) -> None:
    _variants(path)
    text_cache.write(path, _entry(), _fingerprint())
    with np.load(path) as archive:
        assert set(archive) == {*KEYS, "fingerprint", "fingerprint_crc"}
    assert text_cache.inspect_contents(path, num_tokens=77, variants=2).status == "stale"
    assert text_cache.check(path, _fingerprint()) == "valid"


def test_contents_are_judged_whatever_they_were_made_from(path: Path) -> None:
    assert text_cache.inspect_contents(path, num_tokens=77) == ("missing", ())
    text_cache.write(path, _entry(), None)
    assert text_cache.inspect_contents(path, num_tokens=77) == ("valid", ())
    assert text_cache.inspect_contents(path, num_tokens=152) == ("stale", ("max token length changed",))
    path.write_bytes(path.read_bytes()[:100])
    assert text_cache.inspect_contents(path, num_tokens=77).status == "broken"


@pytest.mark.parametrize("change", ["drop a row", "change a row", "drop the index", "rewrite the caption"])
def test_wordings_that_another_program_spoils_are_stale(path: Path, change: str) -> None:
    made_from = _variants(path)
    with np.load(path) as archive:
        kept = dict(archive)
    if change == "drop a row":
        del kept["pool2_v2"]
    elif change == "change a row":
        kept["pool2_v2"] = kept["pool2_v2"] + 1
    elif change == "drop the index":
        del kept["variant_index"]
    else:
        kept["pool2"] = kept["pool2"] + 1
    np.savez(path, **kept)
    reason = "number of caption variants changed" if change == "rewrite the caption" else "caption variants damaged"
    assert text_cache.inspect(path, made_from, variants=4) == ("stale", (reason,))

"""Latent caches: sd-scripts' format to the letter, and no entry used that does not belong to the image."""

from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.errors import UserError
from library.io import fingerprint as fp
from library.io import latent_cache
from library.io.latent_cache import LatentEntry, latent_cache_path
from library.sizes import Size

ORIGINAL = Size(1920, 1080)
LTRB = (0.0, 6.0, 1344.0, 762.5)


def _fingerprint(**changed: object) -> str:
    parts = {"image": fp.ImageStamp(10, 20, "h"), "bucket": Size(48, 32), "resized": Size(50, 32), "crop": (1, 0)}
    return fp.latent_fingerprint(**parts | {"vae_id": "v"} | changed)


def _entry(seed: int = 0, flipped: bool = False, hw: tuple[int, int] = (4, 6)) -> LatentEntry:
    latents, mirrored = torch.randn(2, 4, *hw, generator=torch.Generator().manual_seed(seed))
    return LatentEntry(latents, mirrored if flipped else None, ORIGINAL, LTRB)


def _status(path: Path, expected: str | None = None, need_flipped: bool = False, hw: tuple[int, int] = (4, 6)) -> str:
    return latent_cache.check(path, expected or _fingerprint(), need_flipped=need_flipped, latent_hw=hw)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cat_1920x1080_sdxl.npz"


@pytest.mark.parametrize(
    ("image", "size", "name"),
    [
        ("cat.jpg", ORIGINAL, "cat_1920x1080_sdxl.npz"),
        ("r.webp", Size(12345, 99), "r_12345x0099_sdxl.npz"),
        ("a.b.png", Size(64, 64), "a.b_0064x0064_sdxl.npz"),
    ],
)
def test_names_follow_the_format(tmp_path: Path, image: str, size: Size, name: str) -> None:
    assert latent_cache_path(tmp_path / image, size) == tmp_path / name
    (tmp_path / image).with_suffix(".npz").touch()
    assert latent_cache_path(tmp_path / image, size) == (tmp_path / image).with_suffix(".npz")


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_numpy_reader_finds_keys_dtypes_and_shapes_of_the_format(path: Path, flipped: bool, dtype) -> None:
    entry = _entry(flipped=flipped)
    half = LatentEntry(entry.latents_4hw.to(dtype), entry.flipped_4hw, ORIGINAL, LTRB)
    latent_cache.write(path, half, _fingerprint())
    with np.load(path, allow_pickle=False) as archive:
        found = {key: (archive[key].dtype.name, archive[key].shape) for key in archive.files}
        assert np.array_equal(archive["latents"], half.latents_4hw.float().numpy())
        assert archive["original_size"].tolist() == [1920, 1080] and archive["crop_ltrb"].tolist() == list(LTRB)
        assert str(archive["fingerprint"]) == _fingerprint()
    expected = {"latents": ("float32", (4, 4, 6)), "original_size": ("int64", (2,)), "crop_ltrb": ("float64", (4,))}
    if flipped:
        expected["latents_flipped"] = ("float32", (4, 4, 6))
    assert {key: value for key, value in found.items() if not key.startswith("fingerprint")} == expected
    assert all(member.compress_type == zipfile.ZIP_STORED for member in zipfile.ZipFile(path).infolist())


@given(seed=st.integers(0, 2**31), flipped=st.booleans(), h=st.integers(1, 9), w=st.integers(1, 9))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reading_gives_back_what_was_written(path: Path, seed: int, flipped: bool, h: int, w: int) -> None:
    entry = _entry(seed, flipped, (h, w))
    latent_cache.write(path, entry, _fingerprint())
    read = latent_cache.read(path)
    assert torch.equal(read.latents_4hw, entry.latents_4hw) and read.latents_4hw.dtype == torch.float32
    assert (read.flipped_4hw is None) == (not flipped)
    assert not flipped or torch.equal(read.flipped_4hw, entry.flipped_4hw)
    assert (read.original, read.crop_ltrb, read.fingerprint) == (ORIGINAL, LTRB, _fingerprint())
    assert _status(path, need_flipped=flipped, hw=(h, w)) == "valid"


def test_only_the_entry_itself_is_left_in_the_folder(path: Path) -> None:
    latent_cache.write(path, _entry(), _fingerprint())
    assert os.listdir(path.parent) == [path.name]


def test_other_programs_keys_stay_and_what_belonged_to_the_old_latents_goes(path: Path) -> None:
    np.savez(
        path,
        latents=np.zeros((4, 4, 6), np.float32),
        latents_flipped=np.zeros((4, 4, 6), np.float32),
        alpha_mask=np.ones((32, 48), np.float32),
        latents_48x32=np.full(3, 7.0),
        theirs=np.array("text"),
    )
    latent_cache.write(path, _entry(), _fingerprint())
    with np.load(path) as archive:
        assert archive["latents_48x32"].tolist() == [7, 7, 7] and str(archive["theirs"]) == "text"
        assert "alpha_mask" not in archive.files and "latents_flipped" not in archive.files


def _masked(path: Path, **changed: object) -> torch.Tensor:
    """Write an entry with a mask made from the file `h` and return the mask."""
    mask_HW = torch.rand(32, 48, generator=torch.Generator().manual_seed(3))
    entry = replace(_entry(flipped=True), mask_HW=mask_HW)
    latent_cache.write(path, entry, _fingerprint(mask=fp.ImageStamp(5, 6, "m"), **changed))
    return mask_HW


def test_a_mask_is_stored_as_sd_scripts_reads_it(path: Path) -> None:
    mask_HW = _masked(path)
    with np.load(path) as archive:
        assert archive["alpha_mask"].dtype == np.float32 and np.array_equal(archive["alpha_mask"], mask_HW.numpy())
    assert torch.equal(latent_cache.read(path).mask_HW, mask_HW)
    assert latent_cache.read(path, with_mask=False).mask_HW is None


def test_a_mask_per_cell_is_stored_in_pixels(path: Path) -> None:
    cells_hw = torch.rand(4, 6, generator=torch.Generator().manual_seed(3))
    latent_cache.write(path, replace(_entry(), mask_HW=cells_hw), _fingerprint())
    stored = latent_cache.read(path).mask_HW
    assert (
        stored.shape == (32, 48)
        and torch.equal(stored[::8, ::8], cells_hw)
        and torch.equal(stored[7::8, 7::8], cells_hw)
    )


def _look(path: Path, expected: str, mask: str | None, **changed: object) -> latent_cache.CacheCheck:
    return latent_cache.inspect(path, expected, need_flipped=True, latent_hw=(4, 6), mask=mask, **changed)


def test_a_mask_counts_only_where_it_is_wanted(path: Path) -> None:
    _masked(path)
    same = _fingerprint(mask=fp.ImageStamp(5, 6))
    assert _look(path, same, "file") == ("valid", ())
    assert _look(path, _fingerprint(mask=fp.ImageStamp(9, 6)), "file") == ("stale", ("mask changed",))
    assert _look(path, _fingerprint(), None) == ("valid", ())
    latent_cache.write(path, _entry(flipped=True), _fingerprint())
    assert _look(path, same, "file") == ("stale", ("no mask",))


def test_a_touched_mask_keeps_its_entry(tmp_path: Path, path: Path) -> None:
    mask = tmp_path / "mask.png"
    mask.write_bytes(b"pixels")
    entry = replace(_entry(flipped=True), mask_HW=torch.ones(4, 6))
    latent_cache.write(path, entry, _fingerprint(mask=fp.image_stamp(mask, with_hash=True)))
    os.utime(mask, ns=(7, 7))
    expected = _fingerprint(mask=fp.image_stamp(mask))
    assert _look(path, expected, "file") == ("stale", ("mask changed",))
    assert _look(path, expected, "file", mask_path=mask) == ("valid", ())
    mask.write_bytes(b"pixelz")
    assert _look(path, expected, "file", mask_path=mask).status == "stale"


def test_masks_of_sd_scripts_are_made_from_alpha(path: Path) -> None:
    shapes = {"latents": (4, 4, 6), "latents_flipped": (4, 4, 6), "alpha_mask": (32, 48)}
    arrays = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    np.savez(path, **arrays, original_size=[8, 8], crop_ltrb=np.zeros(4))
    assert _look(path, _fingerprint(mask=fp.ImageStamp(5, 6)), "alpha") == ("foreign", ())
    assert _look(path, _fingerprint(mask=fp.ImageStamp(5, 6)), "file").status == "stale"
    np.savez(
        path, **arrays | {"alpha_mask": np.zeros((32, 40), np.float32)}, original_size=[8, 8], crop_ltrb=np.zeros(4)
    )
    assert _look(path, _fingerprint(mask=fp.ImageStamp(5, 6)), "alpha") == ("stale", ("bucket changed",))
    assert _look(path, _fingerprint(), None) == ("foreign", ())


def test_sd_scripts_own_file_is_foreign_and_read_as_it_is(path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(4, 4, 6)).astype(np.float32)
    np.savez(path, latents=latents, original_size=np.array([1920, 1080]), crop_ltrb=np.array(LTRB))
    assert _status(path) == "foreign"
    entry = latent_cache.read(path)
    assert entry.fingerprint is None and entry.original == ORIGINAL and entry.crop_ltrb == LTRB
    assert np.array_equal(entry.latents_4hw.numpy(), latents)


def test_an_entry_sd_scripts_rewrote_in_place_no_longer_counts_as_ours(path: Path) -> None:
    """It keeps our fingerprint while replacing the latents, perhaps with those of another VAE."""
    latent_cache.write(path, _entry(seed=1, flipped=True), _fingerprint())
    assert _status(path) == "valid"
    with np.load(path) as archive:
        kept = dict(archive)
    for key in ("latents", "latents_flipped"):
        np.savez(path, **kept | {key: kept[key] + 1})
        assert _status(path) == "foreign"
    np.savez(path, **kept | {"alpha_mask": np.ones((32, 48), np.float32)})
    assert _status(path) == "valid"


@pytest.mark.parametrize("lacking", ["latents", "original_size", "crop_ltrb"])
def test_a_file_that_lacks_a_key_is_stale_and_reading_it_names_the_key(path: Path, lacking: str) -> None:
    keys = {"latents": np.zeros((4, 4, 6), np.float32), "original_size": np.array([8, 8]), "crop_ltrb": np.zeros(4)}
    del keys[lacking]
    np.savez(path, **keys)
    assert _status(path) == "stale"
    with pytest.raises(UserError, match=lacking) as caught:
        latent_cache.read(path)
    assert caught.value.problems[0].where == str(path)


@pytest.mark.parametrize("foreign", [False, True])
def test_another_shape_or_a_missing_mirror_image_is_stale(path: Path, foreign: bool) -> None:
    if foreign:
        np.savez(path, latents=np.zeros((4, 4, 6), np.float32), original_size=[8, 8], crop_ltrb=np.zeros(4))
    else:
        latent_cache.write(path, _entry(), _fingerprint())
    result = latent_cache.inspect(path, _fingerprint(), need_flipped=True, latent_hw=(4, 6))
    assert result == ("stale", ("no latents of the mirrored image",))
    result = latent_cache.inspect(path, _fingerprint(), need_flipped=False, latent_hw=(6, 4))
    assert result == ("stale", ("bucket changed",))


def test_what_made_a_stale_entry_stale_is_said(path: Path) -> None:
    latent_cache.write(path, _entry(), _fingerprint())
    result = latent_cache.inspect(path, _fingerprint(vae_id="w", crop=(0, 0)), need_flipped=False, latent_hw=(4, 6))
    assert result == ("stale", ("crop changed", "VAE changed"))


def test_a_touched_image_keeps_its_entry(tmp_path: Path, path: Path) -> None:
    image = tmp_path / "cat.jpg"
    image.write_bytes(b"pixels")
    latent_cache.write(path, _entry(), _fingerprint(image=fp.image_stamp(image, with_hash=True)))
    os.utime(image, ns=(7, 7))
    expected = _fingerprint(image=fp.image_stamp(image))
    assert _status(path, expected) == "stale"
    assert latent_cache.check(path, expected, need_flipped=False, latent_hw=(4, 6), image_path=image) == "valid"


def test_missing_entries_are_missing(path: Path) -> None:
    assert _status(path) == "missing"


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", bytes(300)])
def test_garbage_is_broken_for_check_a_user_error_for_read_and_replaced_by_write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    result = latent_cache.inspect(path, _fingerprint(), need_flipped=False, latent_hw=(4, 6))
    assert result.status == "broken" and result.reasons
    with pytest.raises(UserError, match="cannot be read") as caught:
        latent_cache.read(path)
    assert caught.value.problems[0].where == str(path)
    latent_cache.write(path, _entry(), _fingerprint())
    assert _status(path) == "valid"


def test_pickled_objects_are_never_unpickled(path: Path) -> None:
    np.savez(path, latents=np.array([{"a": 1}], dtype=object), original_size=[8, 8], crop_ltrb=np.zeros(4))
    assert _status(path, hw=(4, 6)) in ("stale", "broken")
    with pytest.raises(UserError, match="cannot be read"):
        latent_cache.read(path)


@given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_makes_check_raise_or_read_return_other_latents(
    path: Path, place: int, value: int, cut: bool
) -> None:
    entry = _entry()
    path.unlink(missing_ok=True)
    latent_cache.write(path, entry, _fingerprint())
    raw = path.read_bytes()
    place %= len(raw)
    path.write_bytes(raw[:place] if cut else raw[:place] + bytes([value]) + raw[place + 1 :])
    assert _status(path) in ("valid", "stale", "foreign", "broken")
    try:
        read = latent_cache.read(path)
    except UserError as error:
        assert error.problems[0].where == str(path)
    else:
        assert torch.equal(read.latents_4hw, entry.latents_4hw)

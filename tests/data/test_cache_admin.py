"""The tool that looks after caches, as users start it: it counts, checks, converts, cleans, and harms nothing else."""

import os

import numpy as np
import pytest
import torch

from library.data.assemble import assemble
from library.data.cache_places import CachePlace, mirrored
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.data.packed_entries import FACTS
from library.data.text_caching import TextCacheOptions, build_text
from library.diffusion.posterior import sample_posterior
from library.io import latent_cache, npz_file, text_cache
from library.io.packed_store import PackedStore
from tests.data.fakes import Counting, fake_text_encoder
from tests.data.specs import dataset, subset, write_folder, write_picture
from tests.data.test_cache_tools import tool
from tests.data.test_latent_moments import fake_moments

NUM = 7
FLAGS = [
    *("--resolution", "64,64", "--enable_bucket", "--min_bucket_reso", "32"),
    *("--max_bucket_reso", "128", "--bucket_reso_steps", "32"),
]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "train" / "1_cat")


@pytest.fixture
def admin(tmp_path, folder, capsys):
    """admin(command, flags...) -> (exit code, printed lines)."""

    def run(*words):
        capsys.readouterr()
        named = ["--train_data_dir", str(tmp_path / "train"), "--caption_extension", ".txt", *FLAGS]
        code = tool("cache_admin").main([words[0], *named, *words[1:]])
        return code, capsys.readouterr().out.splitlines()

    return run


def fill(folder, *, place=None, flip=False, vae="vae"):
    """Both caches of the folder, made by fake encoders; returns what was built of latents and captions."""
    specs = [dataset(subset(folder, flip_aug=flip, class_tokens="cat"))]
    table, _ = assemble(specs)
    place = {} if place is None else {"place": place}
    latents, one = build_latents(
        table, Counting(), options=LatentCacheOptions(vae, to_disk=True, batch_size=2, **place)
    )
    options = TextCacheOptions("te", 1, to_disk=True, **place)
    text, other = build_text(table, fake_text_encoder, options=options)
    return latents, text, (one.built, other.built)


def packed(tmp_path):
    return CachePlace("packed", tmp_path / "train" / ".sdxl_cache")


def status(lines):
    """(kind, store) -> column -> number."""
    names = next(line for line in lines if line.startswith("kind")).replace("dead bytes", "dead").split()
    rows = [line.split() for line in lines if line.startswith(("latents  ", "text  "))]
    return {(row[0], row[1]): dict(zip(names[2:], map(int, row[2:]), strict=True)) for row in rows}


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_status_counts_what_is_right_stale_missing_orphaned_and_unused(folder, admin, tmp_path):
    fill(folder)
    fill(folder, place=packed(tmp_path))
    write_picture(folder / "p0.png", 64, 64, seed=99)
    (folder / "p1.txt").write_text("new words", encoding="utf-8")
    (folder / "p2.png").unlink()
    write_picture(folder / "q.png", 64, 64, caption="q", seed=4)
    code, lines = admin("status")
    found = status(lines)
    assert code == 0 and "no model is named" in lines[0]
    npz, store = found["latents", "npz"], found["latents", "packed"]
    for row in (npz, store):
        assert (row["valid"], row["stale"], row["missing"], row["orphaned"]) == (5, 1, 1, 1)
        assert row["bytes"] > 0
    assert any("image changed" in line for line in lines)
    text = found["text", "npz"]
    assert (text["valid"], text["stale"], text["missing"], text["orphaned"]) == (5, 1, 1, 1)
    text = found["text", "packed"]
    assert (text["valid"], text["stale"], text["missing"], text["orphaned"]) == (5, 0, 2, 2)


def test_an_image_that_is_left_out_today_keeps_its_packed_entry(folder, admin, tmp_path):
    fill(folder, place=packed(tmp_path))
    (folder / "p3.txt").write_bytes(b"\xff not UTF-8")  # its image cannot be used until this is mended
    row = status(admin("status")[1])["latents", "packed"]
    assert (row["valid"], row["unused"], row["orphaned"]) == (NUM - 1, 1, 0)


def test_status_judges_by_the_model_that_is_named(folder, admin, tmp_path):
    fill(folder)
    fill(folder, place=packed(tmp_path))
    _, lines = admin("status", "--pretrained_model_name_or_path", "tiny")
    found = status(lines)
    assert all(row["stale"] == NUM and row["valid"] == 0 for row in found.values())
    assert any("VAE changed (7)" in line for line in lines)


def test_entries_of_other_settings_are_unused_and_stay(folder, admin, tmp_path):
    fill(folder, place=packed(tmp_path))
    large = ["--resolution", "96,96"]
    row = status(admin("status", *large)[1])["latents", "packed"]
    assert (row["valid"], row["missing"], row["unused"], row["orphaned"]) == (0, NUM, NUM, 0)
    admin("clean", "--yes", *large)
    assert status(admin("status")[1])["latents", "packed"]["valid"] == NUM


def test_verify_finds_damage_in_both_stores_and_deletes_it_when_asked(folder, admin, tmp_path):
    fill(folder)
    fill(folder, place=packed(tmp_path))
    assert admin("verify") == (0, ["no model is named: entries are judged by images, placements and captions, "
                                   "whatever model made them", "broken 0"])  # fmt: skip
    path = folder / "p0_0064x0064_sdxl.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 255
    path.write_bytes(data)
    entry = latent_cache.read(folder / "p3_0070x0064_sdxl.npz")
    broken = latent_cache.LatentEntry(entry.latents_4hw * torch.nan, None, entry.original, entry.crop_ltrb)
    latent_cache.write(folder / "p3_0070x0064_sdxl.npz", broken, entry.fingerprint)
    (shard,) = (tmp_path / "train" / ".sdxl_cache" / "latents").glob("*.sdxlpack")
    with open(shard, "r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 255]))
    code, lines = admin("verify")
    assert code == 1 and lines[-1] == "broken 3"
    assert sum("p0_0064x0064" in line for line in lines) == 1 and any("not finite" in line for line in lines)
    code, lines = admin("verify", "--delete_broken")
    assert code == 0 and lines[-1] == "broken 3, deleted 3"
    assert not path.exists() and admin("verify")[1][-1] == "broken 0"
    found = status(admin("status")[1])
    assert found["latents", "npz"]["valid"] == NUM - 2 and found["latents", "packed"]["valid"] == NUM - 1


@pytest.mark.parametrize("flip", [False, True])
def test_packing_and_unpacking_gives_the_files_back(folder, admin, tmp_path, flip):
    fill(folder, flip=flip)
    before = {path: npz_file.read_arrays(path) for path in folder.glob("*.npz")}
    flags = ["--flip_aug"] if flip else []
    code, lines = admin("pack", "--remove", *flags)
    assert code == 0, lines
    assert lines[-2:] == [f"{kind}: written 7, there already 0, removed 7, failed 0" for kind in ("latents", "text")]
    assert not list(folder.glob("*.npz"))
    assert fill(folder, place=packed(tmp_path), flip=flip)[2] == (0, 0), "training builds nothing"
    code, lines = admin("unpack", *flags)
    assert code == 0 and lines[-1] == "text: written 7, there already 0, removed 0, failed 0"
    after = {path: npz_file.read_arrays(path) for path in folder.glob("*.npz")}
    assert after.keys() == before.keys()
    for path, arrays in before.items():
        assert after[path].keys() == arrays.keys()
        for key, array in arrays.items():
            found = after[path][key]
            if key == "fingerprint":
                assert str(found) == str(array)
            elif key != "fingerprint_crc":
                assert found.shape == array.shape
                assert np.allclose(found.astype(np.float64), array.astype(np.float64), rtol=1e-3, atol=1e-3)
        if path.name.endswith("_sdxl.npz"):
            assert after[path]["latents"].dtype == np.float32 and after[path]["original_size"].dtype == np.int64
            assert after[path]["crop_ltrb"].dtype == np.float64
    assert fill(folder, flip=flip)[2] == (0, 0), "the files are right again"


def test_packing_again_writes_nothing(folder, admin):
    fill(folder)
    admin("pack")
    assert admin("pack")[1][-2] == "latents: written 0, there already 7, removed 0, failed 0"


def test_files_of_other_programs_are_packed_when_they_fit_and_stay_unproven(folder, admin, tmp_path):
    fill(folder)
    for path in folder.glob("*_sdxl.npz"):
        arrays = npz_file.read_arrays(path)
        np.savez(path, **{key: arrays[key] for key in ("latents", "original_size", "crop_ltrb")})
    wrong = npz_file.read_arrays(folder / "p3_0070x0064_sdxl.npz")
    np.savez(folder / "p3_0070x0064_sdxl.npz", **wrong | {"latents": np.zeros((4, 4, 4), np.float32)})
    code, lines = admin("pack")
    assert code == 0 and lines[-2] == "latents: written 6, there already 0, removed 0, failed 0"
    row = status(admin("status", "--pretrained_model_name_or_path", "tiny")[1])["latents", "packed"]
    assert (row["foreign"], row["missing"]) == (6, 1)
    for path in folder.glob("*_sdxl.npz"):
        path.unlink()
    admin("unpack")
    assert "fingerprint" not in npz_file.read_arrays(folder / "p0_0064x0064_sdxl.npz")
    assert status(admin("status")[1])["latents", "npz"]["foreign"] == 6


def test_removing_keeps_files_that_say_more_than_the_packed_entry(folder, admin):
    fill(folder)
    path = folder / "p0_0064x0064_sdxl.npz"
    arrays = npz_file.read_arrays(path)
    np.savez(path, **arrays | {"somebody_elses": np.ones(3)})
    other = folder / "p1_0096x0040_sdxl.npz"
    np.savez(other, **npz_file.read_arrays(other) | {"alpha_mask": np.ones((32, 96), np.float32)})
    _, lines = admin("pack", "--remove")
    assert lines[-2] == "latents: written 7, there already 0, removed 5, failed 0"
    assert path.exists() and other.exists()


def test_npz_files_in_the_cache_folder_are_found(folder, admin, tmp_path):
    place = CachePlace(folder=tmp_path / "cache")
    fill(folder, place=place)
    flags = ["--cache_dir", str(tmp_path / "cache")]
    assert status(admin("status", *flags)[1])["latents", "npz"]["valid"] == NUM
    (folder / "p2.png").unlink()
    _, lines = admin("clean", "--yes", *flags)
    assert sum(line.endswith("p2_0040x0096_sdxl.npz") for line in lines) == 1
    assert len(list(mirrored(folder, tmp_path / "cache").glob("*_sdxl.npz"))) == NUM - 1


def test_cleaning_removes_stale_and_orphaned_entries_and_only_when_told(folder, admin, tmp_path):
    fill(folder)
    fill(folder, place=packed(tmp_path))
    fill(folder, place=packed(tmp_path), vae="other")
    write_picture(folder / "p0.png", 64, 64, seed=99)
    (folder / "p2.png").unlink()
    before = snapshot(tmp_path / "train")
    code, lines = admin("clean")
    assert code == 0 and "would be removed" in lines[-1]
    assert {p: d for p, d in snapshot(tmp_path / "train").items() if p.name != ".sdxl_dataset_index"} == {
        p: d for p, d in before.items() if p.name != ".sdxl_dataset_index"
    }
    code, lines = admin("clean", "--yes")
    gone = {path.name for path in before} - {path.name for path in snapshot(tmp_path / "train")}
    gone = {name for name in gone if name.endswith(".npz")}
    assert gone == {"p0_0064x0064_sdxl.npz", "p2_0040x0096_sdxl.npz", "p2_te_outputs.npz"}
    store = PackedStore.open(tmp_path / "train" / ".sdxl_cache" / "latents", facts_dtype=FACTS)
    assert sorted(store.key(p) for p in store.live().tolist()) == [f"1_cat/p{n}.png" for n in (1, 3, 4, 5, 6)]
    assert admin("clean")[1][-1].startswith("0 files, 0 bytes")
    assert fill(folder, place=packed(tmp_path), vae="other")[2] == (1, 0)


STRANGERS = {
    "p0.npz": {"latents": np.zeros((4, 8, 8), np.float32)},
    "notes_0001x0001_sdxl.npz": {"weights": np.zeros(3)},
    "gone_0064x0064_sdxl.npz": {
        "latents": np.zeros((4, 8, 8), np.float32),
        "original_size": np.array([64, 64]),
        "crop_ltrb": np.zeros(4),
        "my_own_key": np.zeros(1),
    },
    "gone_te_outputs.npz": {"hidden_state1": np.zeros((77, 768)), "other": np.zeros(1)},
    "dataset_sdxl.npz": {"latents": np.zeros((4, 8, 8)), "original_size": np.zeros(2), "crop_ltrb": np.zeros(4)},
}


def test_cleaning_never_touches_files_that_are_no_entries(folder, admin, tmp_path):
    fill(folder)
    for name, arrays in STRANGERS.items():
        np.savez(folder / name, **arrays)
    (folder / "torn_0064x0064_sdxl.npz").write_bytes(b"no archive")
    outside = write_folder(tmp_path / "elsewhere")
    fill(outside)
    (outside / "p0.png").unlink()
    target = outside / "p0_0064x0064_sdxl.npz"
    (folder / "linked_0064x0064_sdxl.npz").symlink_to(target)
    before = snapshot(folder) | snapshot(outside)
    admin("clean", "--yes")
    after = snapshot(folder) | snapshot(outside)
    lost = {path.name for path in before.keys() - after.keys()}
    assert lost == set()
    assert all(after[path] == data for path, data in before.items() if path.name != ".sdxl_dataset_index")


def test_text_entries_of_equal_captions_are_packed_once_and_all_files_removed(folder, admin, tmp_path):
    for number in range(NUM):
        (folder / f"p{number}.txt").write_text("the same", encoding="utf-8")
    fill(folder)
    _, lines = admin("pack", "--remove")
    assert lines[-1] == "text: written 1, there already 6, removed 7, failed 0"
    admin("unpack")
    assert len(list(folder.glob("*_te_outputs.npz"))) == NUM
    assert text_cache.read(folder / "p3_te_outputs.npz").hidden_state1.dtype == torch.float16


def test_moments_go_to_the_packed_cache_and_back(folder, admin, tmp_path):
    specs = [dataset(subset(folder, flip_aug=True))]

    def built(place):
        options = LatentCacheOptions("vae", to_disk=True, batch_size=2, moments=True, place=place)
        return build_latents(assemble(specs)[0], Counting(fake_moments), options=options)[1].built

    beside, store = CachePlace("npz"), packed(tmp_path)
    assert built(beside) == NUM
    code, lines = admin("pack", "--remove", "--flip_aug")
    assert code == 0 and f"latents: written {NUM}, there already 0, removed {NUM}, failed 0" in lines
    assert built(store) == 0
    assert admin("unpack", "--flip_aug")[0] == 0
    assert built(beside) == 0


def test_files_with_moments_stay_when_the_packed_cache_has_none(folder, admin, tmp_path):
    def sampled(pixels, noise):
        moments, finite = fake_moments(pixels, noise)
        return sample_posterior(moments, noise), finite

    for encode, place, moments in ((sampled, packed(tmp_path), False), (fake_moments, CachePlace("npz"), True)):
        options = LatentCacheOptions("vae", to_disk=True, batch_size=2, moments=moments, place=place)
        build_latents(assemble([dataset(subset(folder))])[0], Counting(encode), options=options)
    _, lines = admin("pack", "--remove")
    assert f"latents: written 0, there already {NUM}, removed 0, failed 0" in lines


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--random_crop"], "random_crop"),
        (["--face_crop_aug_range", "2,4", "--no_enable_bucket"], "face_crop_aug_range"),
        (
            ["--random_crop", "--face_crop_aug_range", "2,4", "--no_enable_bucket"],
            "random_crop and face_crop_aug_range",
        ),
    ],
)
def test_latents_that_no_run_caches_are_left_out(admin, flags, names):
    code, lines = admin("status", *flags)
    assert code == 0 and f"latents are left out: {names} cannot be cached" in lines
    assert not any(line.startswith("latents  ") for line in lines)

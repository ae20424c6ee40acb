"""Where caches lie: beside the images, mirrored in --cache_dir, or packed; and folders that refuse to be written to."""

import os
from pathlib import Path

import pytest
import torch

from library.config.cli import make_config
from library.data.assemble import assemble
from library.data.cache_places import CachePlace, cache_place, mirrored, require_writable
from library.data.dataset import build_train_data
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.data.text_caching import TextCacheOptions, build_text
from library.errors import UserError
from tests.data.fakes import Counting, fake_text_encoder
from tests.data.ranks import Ranks
from tests.data.specs import dataset, subset, write_folder, write_picture

NUM = 7


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


def latents(folder, encode=None, **options):
    images, _ = assemble([dataset(subset(folder))])
    return build_latents(images, encode or Counting(), options=LatentCacheOptions("vae", to_disk=True, **options))


def text(folder, **options):
    images, _ = assemble([dataset(subset(folder))])
    values = {"text_encoder_id": "te", "width_1": 1, "to_disk": True} | options
    return build_text(images, fake_text_encoder, options=TextCacheOptions(**values))


def figures(report):
    return report.built, report.reused, len(report.stale), len(report.failed)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("run", [latents, text])
def test_npz_files_go_to_the_folder_that_mirrors_the_images_folder(folder, tmp_path, run):
    before = names(folder)
    place = CachePlace(folder=tmp_path / "cache")
    _, report = run(folder, place=place)
    assert figures(report) == (NUM, 0, 0, 0) and names(folder) == before
    (only,) = (tmp_path / "cache").iterdir()
    assert only == mirrored(folder, tmp_path / "cache") and only.name.startswith("pictures-") and len(only.name) == 17
    assert len(list(only.glob("*.npz"))) == NUM and (only / f".sdxl_{run.__name__}_index").exists()
    suffix = "_0064x0064_sdxl.npz" if run is latents else "_te_outputs.npz"
    assert (only / f"p0{suffix}").exists()
    assert figures(run(folder, place=place)[1]) == (0, NUM, 0, 0)


@pytest.mark.parametrize("run", [latents, text])
def test_right_entries_beside_the_images_are_used_and_wrong_ones_are_left_alone(folder, tmp_path, run):
    run(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "p1.txt").write_text("another caption", encoding="utf-8")
    write_picture(folder / "p1.png", 96, 40, seed=77)
    before |= {name: (folder / name).read_bytes() for name in ("p1.txt", "p1.png")}
    place = CachePlace(folder=tmp_path / "cache")
    store, report = run(folder, place=place)
    assert figures(report) == (1, NUM - 1, 0, 0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    again, report = run(folder, place=place)
    assert figures(report) == (0, NUM, 0, 0)
    if run is latents:
        one, other = store.get(1, flipped=False), again.get(1, flipped=False)
        assert torch.equal(one.latents_4hw, other.latents_4hw)


def test_every_rank_reads_right_entries_beside_the_images(folder, tmp_path, monkeypatch):
    latents(folder)
    write_picture(folder / "p1.png", 96, 40, seed=77)
    options = LatentCacheOptions("vae", to_disk=True, place=CachePlace(folder=tmp_path / "cache"))
    images, _ = assemble([dataset(subset(folder))])
    results = Ranks(2, monkeypatch).run(
        lambda rank: build_latents(images, Counting(), options=options, rank=rank, world=2)
    )
    for store, report in results:
        assert figures(report) == (1, NUM - 1, 0, 0)
        for row in range(NUM):
            assert store.get(row, flipped=False).latents_4hw.shape[0] == 4


def test_folders_of_one_name_do_not_share_a_mirror(tmp_path):
    one, other = mirrored(tmp_path / "a" / "cat", tmp_path), mirrored(tmp_path / "b" / "cat", tmp_path)
    assert one != other and one == mirrored(tmp_path / "b" / ".." / "a" / "cat", tmp_path)


def test_the_indexes_of_image_folders_lie_in_the_cache_folder_too(folder, tmp_path):
    before = names(folder)
    os.utime(folder, ns=(1, 1))
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    build_train_data([dataset(subset(folder))], seed=0, cache_dir=tmp_path / "cache")
    assert names(folder) == before
    assert names(mirrored(folder, tmp_path / "cache")) == {".sdxl_dataset_index"}


def _refusing(folder):
    """os.access as for a folder that nothing can be written to."""
    access = os.access
    return lambda path, mode: Path(path) != folder and access(path, mode)


@pytest.mark.parametrize("run", [latents, text])
def test_a_read_only_image_folder_is_said_before_anything_is_encoded(folder, tmp_path, run, monkeypatch):
    monkeypatch.setattr("library.data.cache_places.os.access", _refusing(folder))
    encode = Counting()
    with pytest.raises(UserError) as caught:
        run(folder, **({"encode": encode} if run is latents else {}))
    assert str(folder) in str(caught.value) and "--cache_dir" in str(caught.value)
    assert encode.loads == 0
    assert figures(run(folder, place=CachePlace(folder=tmp_path / "cache"))[1]) == (NUM, 0, 0, 0)


@pytest.mark.parametrize("run", [latents, text])
def test_a_complete_cache_in_a_read_only_folder_is_used(folder, run, monkeypatch):
    run(folder)
    monkeypatch.setattr("library.data.cache_places.os.access", _refusing(folder))
    assert figures(run(folder)[1]) == (0, NUM, 0, 0)


def test_a_file_system_that_permits_and_refuses_counts_as_read_only(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("library.data.cache_places.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match="cannot be written"):
        require_writable([tmp_path])


def test_the_packed_cache_lies_with_what_names_the_data(tmp_path):
    folder = write_folder(tmp_path / "train" / "2_cat")
    (tmp_path / "sets").mkdir()
    description = tmp_path / "sets" / "data.toml"
    description.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\n")
    base = {"pretrained_model_name_or_path": "tiny", "resolution": "64", "cache_store": "packed"}
    train = {"train_data_dir": str(tmp_path / "train")}
    file = {"dataset_config": str(description)}

    def place(**values):
        return cache_place(make_config("cache_latents", **base | values))

    assert place(**train) == CachePlace("packed", tmp_path / "train" / ".sdxl_cache")
    assert place(**train, **file) == CachePlace("packed", tmp_path / "sets" / ".sdxl_cache")
    assert place(**train, cache_dir=str(tmp_path / "c")) == CachePlace("packed", tmp_path / "c")
    assert place(**train, cache_store="npz") == CachePlace()
    assert place(**train).latents == tmp_path / "train" / ".sdxl_cache" / "latents"


def test_a_cache_in_train_data_dir_is_no_folder_of_images(tmp_path):
    write_folder(tmp_path / "2_cat")
    (tmp_path / ".sdxl_cache" / "latents").mkdir(parents=True)
    cfg = make_config(
        "cache_latents", pretrained_model_name_or_path="tiny", train_data_dir=str(tmp_path), resolution="64"
    )
    assert not [notice for notice in cfg.notices if ".sdxl_cache" in notice]


def test_indexes_of_mask_folders_lie_in_the_cache_folder_too(tmp_path):
    for name in ("images", "masks"):
        for path in write_folder(tmp_path / name, sizes=[(64, 64)] * 2).iterdir():
            os.utime(path, (1e9, 1e9))
    spec = dataset(subset(tmp_path / "images", mask_dir=str(tmp_path / "masks")))
    assemble([spec], cache_dir=tmp_path / "cache")
    folders = {path.parent.name.rpartition("-")[0] for path in (tmp_path / "cache").rglob(".sdxl_dataset_index")}
    assert folders == {"images", "masks"}
    assert list((tmp_path / "masks").glob(".sdxl*")) == []

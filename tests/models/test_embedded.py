"""The embedded tiny model as a file: ordinary, cached, safe with several processes."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.io.safetensors_file import read_header
from library.models import checkpoint, embedded
from library.models.arch import PREFIXES
from library.models.tiny.unpack import unpack


def test_it_is_an_ordinary_half_precision_single_file(tiny_path: Path):
    metadata, tensors = read_header(tiny_path)
    assert {info.dtype for info in tensors.values()} == {"F16"}
    assert all(name.startswith(tuple(PREFIXES.values())) for name in tensors)
    assert metadata["arch.norm_groups"] == "8" and metadata["arch.head_dim"] == "16"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert isinstance(json.loads(metadata["tiny.score"]), dict)
    assert tiny_path.stat().st_size < 19_000_000


def test_its_tensors_are_the_packed_ones(half_bundle):
    state, _ = unpack()
    named = {"unet.": half_bundle.unet, "te1.": half_bundle.text_encoder_1, "te2.": half_bundle.text_encoder_2}
    named["vae."] = half_bundle.vae
    loaded = {prefix + key: value for prefix, module in named.items() for key, value in module.state_dict().items()}
    assert loaded.keys() == state.keys()
    assert [key for key in state if not torch.equal(loaded[key], state[key])] == []


def test_it_is_written_once(tiny_path: Path):
    before = tiny_path.stat().st_mtime_ns
    assert checkpoint.resolve_checkpoint("tiny") == tiny_path
    assert tiny_path.stat().st_mtime_ns == before


def test_several_processes_may_write_it_at_once(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path))
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        paths = pool.starmap(embedded.materialised_tiny, [()] * 3, chunksize=1)
    assert set(paths) == {tmp_path / tiny_path.name}
    assert [path.name for path in tmp_path.iterdir()] == [tiny_path.name]
    assert (tmp_path / tiny_path.name).read_bytes() == tiny_path.read_bytes()


def test_other_packed_weights_make_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_path: Path):
    monkeypatch.setattr(embedded, "_WRITER_VERSION", "another")
    monkeypatch.setattr(embedded, "save", lambda tensors, path, metadata, dtype: path.write_bytes(b""))
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path))
    assert embedded.materialised_tiny().name != tiny_path.name


def test_a_missing_weights_file_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path / "none")
    with pytest.raises(UserError, match="tiny SDXL is missing"):
        embedded.materialised_tiny()


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv(embedded.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / "sdxl-trainer-suite"
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path / "mine"))
    assert embedded.cache_folder() == tmp_path / "mine"

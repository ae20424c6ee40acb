"""The index of a cache folder: confirms without opening, and only what is still as it was."""

import os

import pytest

from library.data.assemble import assemble
from library.data.cache_index import FILE_NAME, CacheIndex
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.data.text_caching import TextCacheOptions, build_text
from library.io import latent_cache, text_cache
from tests.data.fakes import Counting, fake_text_encoder
from tests.data.specs import dataset, subset, write_folder


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"12345")
    return path


def saved(file, **changes):
    index = CacheIndex()
    index.add(file, "made from this", **changes)
    index.save()
    fresh = CacheIndex()
    fresh.load([file.parent])
    return fresh


def test_a_file_is_confirmed_in_the_next_run(file):
    assert saved(file).confirms(file, "made from this")


def test_nothing_else_is_confirmed(file):
    index = saved(file, contents="plain")
    assert index.confirms(file, "made from this", contents="plain")
    assert not index.confirms(file, "made from that", contents="plain")
    assert not index.confirms(file, "made from this", contents="plain and mirrored")
    assert not index.confirms(file.with_name("b.npz"), "made from this", contents="plain")
    os.utime(file, ns=(1, 1))
    assert not index.confirms(file, "made from this", contents="plain")
    file.unlink()
    assert not index.confirms(file, "made from this", contents="plain")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 0, "files": {}}', b'{"version": 1, "files": 3}'])
def test_a_damaged_index_counts_as_none(file, content):
    saved(file)
    (file.parent / FILE_NAME).write_bytes(content)
    index = CacheIndex()
    index.load([file.parent])
    assert not index.confirms(file, "made from this")


def test_a_complete_cache_is_taken_without_opening_a_file(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "pictures")
    images, _ = assemble([dataset(subset(folder, flip_aug=True))])

    def passes():
        _, latents = build_latents(images, Counting(), options=LatentCacheOptions("v", to_disk=True))
        _, text = build_text(images, fake_text_encoder, options=TextCacheOptions("t", 1, to_disk=True))
        return latents.line(), text.line()

    assert passes() == ("built 7, reused 0, stale 0, failed 0",) * 2
    for module in (latent_cache, text_cache):
        monkeypatch.setattr(module, "inspect", lambda *_, **__: pytest.fail("a cache file was opened"))
    assert passes() == ("built 0, reused 7, stale 0, failed 0",) * 2


def test_a_folder_that_cannot_be_written_goes_without_an_index(file, monkeypatch):
    index = CacheIndex()
    index.add(file, "made from this")
    (file.parent / FILE_NAME).mkdir()
    index.save()
    assert list((file.parent / FILE_NAME).iterdir()) == []

"""The indexes of cache folders: they confirm without opening, and only what is still as it was."""

import os
import shutil

import numpy as np
import pytest

from library.data import latent_backends
from library.data.assemble import assemble
from library.data.cache_index import CacheIndex, Known, index_name
from library.data.caching import groups_of
from library.data.entry_places import EntryPlaces
from library.data.folder_listing import file_stamps
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.data.text_caching import TextCacheOptions, build_text
from library.io import latent_cache, text_cache
from library.io.latent_cache import CacheCheck
from library.sizes import Size
from tests.data.fakes import Counting, fake_text_encoder
from tests.data.specs import dataset, subset, write_folder, write_picture

FACTS = np.array([[1, 2, 3], [1, 2, 4], [2**64 - 1, 0, 0]], dtype=np.uint64)
NAMES = ["a.npz", "b.npz", "ü c.npz"]


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_bytes(b"12345")
    return tmp_path


def note(folder, names=NAMES, facts=FACTS):
    CacheIndex(folder, "latents", width=facts.shape[1]).note(Known(list(names), file_stamps(folder, names), facts))


def find(folder, facts=FACTS):
    return CacheIndex(folder, "latents", width=facts.shape[1]).find(facts)


def test_files_are_confirmed_in_the_next_run_in_any_order(folder):
    note(folder)
    assert find(folder) == NAMES
    assert find(folder, FACTS[::-1]) == NAMES[::-1]
    assert find(folder, FACTS[[1]]) == NAMES[1:2]


def test_nothing_else_is_confirmed(folder):
    note(folder)
    for column in range(3):
        other = FACTS.copy()
        other[:, column] ^= np.uint64(1 << 40)
        assert find(folder, other) == [None] * 3
    assert CacheIndex(folder, "text", width=3).find(FACTS) == [None] * 3
    os.utime(folder / NAMES[0], ns=(1, 1))
    (folder / NAMES[1]).write_bytes(b"123456")
    (folder / NAMES[2]).unlink()
    assert find(folder) == [None] * 3


def test_what_is_noted_later_takes_the_place_of_what_was_known(folder):
    note(folder)
    changed = np.array([[7, 7, 7]], dtype=np.uint64)
    note(folder, ["a.npz"], changed)  # the file holds something else now
    (folder / "d.npz").write_bytes(b"1")
    note(folder, ["d.npz"], FACTS[[1]])  # the entry lies in another file now
    assert find(folder) == [None, "d.npz", "ü c.npz"]
    assert find(folder, changed) == ["a.npz"]


def test_a_file_that_has_gone_is_not_noted(folder):
    (folder / "b.npz").unlink()
    note(folder)
    (folder / "b.npz").write_bytes(b"12345")
    assert find(folder) == ["a.npz", None, "ü c.npz"]


def archive(**changes):
    arrays = {
        "version": np.array(2),
        "names": np.frombuffer(b"a.npz", np.uint8),
        "stamps": np.zeros((1, 2), np.int64),
        "made_from": FACTS[:1],
    }
    return {key: value for key, value in (arrays | changes).items() if value is not None}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 torn",
        b'{"version": 1, "files": {}}',
        archive(version=np.array(1)),
        archive(stamps=np.zeros((2, 2), np.int64)),
        archive(stamps=np.zeros((1, 2), np.float64)),
        archive(made_from=FACTS[:1, :2]),
        archive(names=np.array([b"\xff"[0]], np.uint8)),
        archive(made_from=None),
    ],
)
def test_a_damaged_or_older_index_counts_as_none(folder, content):
    note(folder)
    path = folder / index_name("latents")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with open(path, "wb") as file:
            np.savez(file, **content)
    assert find(folder) == [None] * 3
    note(folder)
    assert find(folder) == NAMES


def test_one_changed_byte_of_the_index_never_confirms_something_else(folder):
    note(folder)
    path = folder / index_name("latents")
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert all(found in (None, name) for found, name in zip(find(folder), NAMES, strict=True)), place


def test_a_folder_that_cannot_be_written_goes_without_an_index(folder):
    (folder / index_name("latents")).mkdir()
    note(folder)
    assert list((folder / index_name("latents")).iterdir()) == []
    assert find(folder) == [None] * 3


def test_an_entry_is_looked_for_where_new_ones_go_and_then_beside_the_image(tmp_path):
    first, beside = tmp_path / "caches", tmp_path / "pictures"
    for folder in (first, beside):
        folder.mkdir()
        for name in NAMES:
            (folder / name).write_bytes(b"12345")
    note(first, NAMES[:1], FACTS[:1])
    note(beside, NAMES[:2], FACTS[:2])
    places = EntryPlaces(
        "latents", [[str(first), str(beside)]], folder_of=np.zeros(3, np.int64), made_from=list(FACTS.T)
    )
    assert places.confirm(rank=0).tolist() == [2]
    checks = places.find(
        [first / "new.npz"],
        lambda number, path: path.with_name("own.npz"),
        lambda number, path: CacheCheck("missing"),
        beside=[beside / "new.npz"],
        rank=0,
        world=1,
        title="looking",
    )
    assert [check.status for check in checks] == ["valid", "valid", "missing"]
    found = [places.paths[number] for number in range(3)]
    assert found == [str(first / "a.npz"), str(beside / "b.npz"), str(first / "new.npz")]


def passes(images, *, vae="v", encoder="t"):
    _, latents = build_latents(images, Counting(), options=LatentCacheOptions(vae, to_disk=True))
    _, text = build_text(images, fake_text_encoder, options=TextCacheOptions(encoder, 1, to_disk=True))
    return latents.line(), text.line()


def table(folder, **changes):
    return assemble([dataset(subset(folder, **changes))])[0]


@pytest.fixture
def opened(monkeypatch):
    """The cache files that are opened to be judged, by name."""
    names = []
    for module in (latent_cache, text_cache):

        def inspect(path, *args, real=module.inspect, **kwargs):
            names.append(os.path.basename(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(module, "inspect", inspect)
    return names


def test_a_complete_cache_is_taken_without_opening_a_file(tmp_path, opened):
    folder = write_folder(tmp_path / "pictures")
    assert passes(table(folder, flip_aug=True)) == ("built 7, reused 0, stale 0, failed 0",) * 2
    opened.clear()
    assert passes(table(folder, flip_aug=True)) == ("built 0, reused 7, stale 0, failed 0",) * 2
    assert opened == []
    moved = folder.rename(tmp_path / "elsewhere")
    assert passes(table(moved, flip_aug=True)) == ("built 0, reused 7, stale 0, failed 0",) * 2
    assert opened == []


def test_what_has_changed_is_looked_at_again_and_nothing_else(tmp_path, opened):
    folder = write_folder(tmp_path / "pictures")
    passes(table(folder))
    opened.clear()
    write_picture(folder / "p0.png", 64, 64, seed=99)
    (folder / "p1.txt").write_text("another caption", encoding="utf-8")
    os.utime(next(folder.glob("p2_*_sdxl.npz")), ns=(1, 1))
    next(folder.glob("p3_te_outputs.npz")).unlink()
    assert passes(table(folder)) == ("built 1, reused 6, stale 1, failed 0", "built 2, reused 5, stale 1, failed 0")
    assert {name[:3] for name in opened} <= {"p0_", "p1_", "p2_", "p3_"} and len(set(opened)) >= 3
    opened.clear()
    passes(table(folder))
    assert opened == []


@pytest.mark.parametrize(
    ("change", "latents", "text"),
    [
        ({"vae": "w"}, 7, 0),
        ({"encoder": "u"}, 0, 7),
        ({"flip_aug": True}, 7, 0),
        ({"resize_interpolation": "box"}, 7, 0),
    ],
)
def test_another_recipe_has_everything_looked_at_again(tmp_path, opened, change, latents, text):
    folder = write_folder(tmp_path / "pictures")
    passes(table(folder))
    opened.clear()
    names = {key: change[key] for key in ("vae", "encoder") if key in change}
    passes(table(folder, **{key: value for key, value in change.items() if key not in names}), **names)
    kinds = ["text" if name.endswith("_te_outputs.npz") else "latents" for name in set(opened)]
    assert (kinds.count("latents"), kinds.count("text")) == (latents, text)


def test_another_bucket_has_the_entry_looked_at_again(tmp_path, opened):
    folder = write_folder(tmp_path / "pictures")
    passes(table(folder))
    opened.clear()
    other, _ = assemble([dataset(subset(folder), resolution=Size(96, 96))])
    _, report = build_latents(other, Counting(), options=LatentCacheOptions("v", to_disk=True))
    assert len(set(opened)) == 7 and report.built == len(report.stale) > 0


def test_a_new_image_does_not_take_the_file_of_a_confirmed_one(tmp_path, opened):
    folder = tmp_path / "pictures"
    write_picture(folder / "a.png", 64, 64, caption="x", seed=1)
    passes(table(folder))
    write_picture(folder / "a.bmp", 64, 64, seed=2)  # stands before a.png and has the same standard name
    opened.clear()
    images = table(folder)
    store, report = build_latents(images, Counting(), options=LatentCacheOptions("v", to_disk=True))
    assert (report.built, report.reused, len(report.stale)) == (1, 1, 0)
    assert len({store.get(row, flipped=False).latents_4hw.sum().item() for row in range(2)}) == 2
    assert not any(name == "a_0064x0064_sdxl.npz" for name in opened)


def test_files_of_other_programs_are_opened_every_time(tmp_path, opened):
    folder = write_folder(tmp_path / "pictures", sizes=[(64, 64)])
    path = latent_cache.latent_cache_path(folder / "p0.png", Size(64, 64))
    arrays = {"latents": np.zeros((4, 8, 8), np.float32), "original_size": np.array([64, 64]), "crop_ltrb": np.zeros(4)}
    np.savez(path, **arrays)
    for _ in range(2):
        opened.clear()
        assert passes(table(folder))[0] == "built 0, reused 1, stale 0, failed 0"
        assert path.name in opened


def test_a_file_that_another_run_replaces_during_the_pass_is_not_noted(tmp_path, opened, monkeypatch):
    folder = write_folder(tmp_path / "pictures", sizes=[(64, 64), (96, 40)])
    entries = latent_backends.NpzLatents.entries

    def after_another_run(self, *args, **kwargs):
        victim = next(folder.glob("p0_*_sdxl.npz"))
        shutil.copy(victim, tmp_path / "copy")
        os.utime(tmp_path / "copy", ns=(5, 5))
        os.replace(tmp_path / "copy", victim)
        return entries(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(latent_backends.NpzLatents, "entries", after_another_run)
        passes(table(folder))
    opened.clear()
    passes(table(folder))
    assert opened == ["p0_0064x0064_sdxl.npz"]


def test_an_image_that_a_source_did_not_stamp_is_confirmed_too(tmp_path, opened):
    folder = write_folder(tmp_path / "pictures")
    for expected in ("built 7, reused 0, stale 0, failed 0", "built 0, reused 7, stale 0, failed 0"):
        images = table(folder)
        images.stamps[:] = -1
        opened.clear()
        assert passes(images) == (expected,) * 2
    assert opened == []
    write_picture(folder / "p0.png", 64, 64, seed=5)
    images = table(folder)
    images.stamps[:] = -1
    assert passes(images)[0] == "built 1, reused 6, stale 1, failed 0"


def test_groups_are_those_of_whole_rows():
    rng = np.random.default_rng(0)
    columns = [
        rng.integers(0, 3, 200),
        rng.integers(0, 2**63, 3, dtype=np.uint64)[rng.integers(0, 3, 200)],
        np.ones(200),
    ]
    first, group = groups_of(columns)
    rows = np.stack([column.astype(np.float64) for column in columns], axis=1)
    expected_first, expected = np.unique(rows, axis=0, return_index=True, return_inverse=True)[1:]
    assert sorted(first.tolist()) == sorted(expected_first.tolist())
    assert len(set(zip(group.tolist(), expected.reshape(-1).tolist(), strict=True))) == len(first) == group.max() + 1
    assert [len(part) for part in groups_of([np.array([], np.int64)])] == [0, 0]

"""The dataset index: what it saves, and that it never changes what a scan finds."""

import builtins
import itertools
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data import dataset_index, file_facts, many_files
from library.data.assemble import assemble
from library.data.dataset import build_train_data
from library.data.dataset_index import FILE_NAME, index_path
from library.data.folder_listing import file_stamps
from library.data.records import ScanReport
from library.data.sources import folders, metadata_json
from library.io.images import ImageError
from library.io.npz_file import write_arrays
from library.sizes import Size
from tests.data.specs import dataset, subset, write_picture

LONG_AGO = 1_600_000_000_000_000_000
moments = itertools.count(LONG_AGO, 1_000_000)


def aged(path):
    """The file with a modification time of its own, long ago: a clock that ticks between any two changes."""
    moment = next(moments)
    os.utime(path, ns=(moment, moment))
    return path


def put(path, width=30, height=20, caption=None):
    """A picture, and perhaps a caption, that were not changed just now."""
    aged(write_picture(path, width, height, caption=caption))
    if caption is not None:
        aged(path.with_suffix(".txt"))


def scanned(folder, *, source=folders, cache_dir=None, use_index=True, **changes):
    report = ScanReport()
    records = source.scan(subset(folder, **changes), report=report, cache_dir=cache_dir, use_index=use_index)
    return list(records), report


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are opened, but the index."""
    names = []
    real_open = builtins.open

    def counting(file, *args, **options):
        name = os.path.basename(os.fspath(file)) if isinstance(file, str | os.PathLike) else ""
        if name.endswith((".png", ".jpg", ".txt", ".caption")):
            names.append(name)
        return real_open(file, *args, **options)

    monkeypatch.setattr(builtins, "open", counting)
    return names


@pytest.fixture
def images(tmp_path):
    """A folder of a.png, b.png, c.png with captions, whose index is written."""
    folder = tmp_path / "imgs"
    for number, name in enumerate("abc"):
        put(folder / f"{name}.png", 30 + number, 20, caption=f"cap {name}\nsecond")
    scanned(folder)
    return folder


def test_a_second_scan_opens_no_image_and_no_caption(images, opened):
    first = scanned(images, use_index=False)
    assert sorted(opened) == ["a.png", "a.txt", "b.png", "b.txt", "c.png", "c.txt"]
    opened.clear()
    assert scanned(images) == first
    assert scanned(images, enable_wildcard=True)[0][0].caption == "cap a\nsecond"
    assert opened == []


def test_only_what_has_changed_is_opened(images, opened):
    aged(images / "a.png")
    (images / "b.txt").write_text("other", encoding="utf-8")
    put(images / "d.png", 8, 9, caption="new")
    opened.clear()
    records, _ = scanned(images)
    assert sorted(opened) == ["a.png", "b.txt", "d.png", "d.txt"]
    assert [(r.key, r.size, r.caption) for r in records] == [
        ("imgs/a.png", (30, 20), "cap a"),
        ("imgs/b.png", (31, 20), "other"),
        ("imgs/c.png", (32, 20), "cap c"),
        ("imgs/d.png", (8, 9), "new"),
    ]
    assert records[3].stamp == ((images / "d.png").stat().st_size, (images / "d.png").stat().st_mtime_ns)


def test_removed_and_renamed_files_leave_the_index(images, opened):
    (images / "a.png").unlink()
    (images / "b.png").rename(images / "z.png")
    scanned(images)
    assert "z.png" in opened
    arrays = np.load(images / FILE_NAME)
    assert arrays["images_names"].tobytes() == b"c.png\0z.png"
    assert sorted(arrays["captions_names"].tobytes().split(b"\0")) == [b"a.txt", b"b.txt", b"c.txt"]
    (images / "a.txt").unlink()
    scanned(images)
    assert sorted(np.load(images / FILE_NAME)["captions_names"].tobytes().split(b"\0")) == [b"b.txt", b"c.txt"]


def rewritten(path, **changes):
    arrays = dict(np.load(path)) | changes
    with open(path, "wb") as file:
        np.savez(file, **arrays)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "one bit": lambda path: path.write_bytes(path.read_bytes().replace(b"cap b", b"caq b")),
    "no archive": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "another version": lambda path: rewritten(path, version=np.array(99), images_sizes=np.ones((3, 2), np.int32)),
    "columns that do not fit": lambda path: rewritten(path, images_sizes=np.ones((2, 2), np.int32)),
    "columns of another kind": lambda path: rewritten(path, images_stamps=np.full((3, 2), "x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_no_index_and_is_made_anew(images, opened, damage):
    DAMAGES[damage](images / FILE_NAME)
    opened.clear()
    records, report = scanned(images)
    assert [record.size.w for record in records] == [30, 31, 32] and report == ScanReport()
    assert [record.caption for record in records] == ["cap a", "cap b", "cap c"]
    assert len(opened) == 6
    opened.clear()
    scanned(images)
    assert opened == []


def test_a_folder_that_cannot_be_written_to_goes_without(tmp_path, images):
    expected = scanned(images)
    (images / FILE_NAME).unlink()
    (images / FILE_NAME).mkdir()
    assert scanned(images) == expected
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert scanned(images, cache_dir=tmp_path / "file") == expected
    assert sorted(p.name for p in images.iterdir() if p.name.startswith(".")) == [FILE_NAME]


def test_without_the_index_nothing_is_written_and_nothing_believed(images):
    stat = (images / "a.png").stat()
    Image.new("RGB", (5, 5)).save(images / "a.png")
    data = (images / "a.png").read_bytes()
    (images / "a.png").write_bytes(data + b"\0" * (stat.st_size - len(data)))
    os.utime(images / "a.png", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    before = (images / FILE_NAME).read_bytes()
    assert scanned(images)[0][0].size == (30, 20)
    assert scanned(images, use_index=False)[0][0].size == (5, 5)
    assert (images / FILE_NAME).read_bytes() == before


def test_with_a_cache_folder_the_image_folders_stay_as_they_are(tmp_path, opened):
    for place in ("here", "there"):
        put(tmp_path / place / "cat" / "a.png", caption=place)
        scanned(tmp_path / place / "cat", cache_dir=tmp_path / "cache")
    opened.clear()
    for place in ("here", "there"):
        records, _ = scanned(tmp_path / place / "cat", cache_dir=tmp_path / "cache")
        assert records[0].caption == place
        assert sorted(os.listdir(tmp_path / place / "cat")) == ["a.png", "a.txt"]
        assert index_path(tmp_path / place / "cat", cache_dir=tmp_path / "cache").is_file()
    assert opened == []


def test_a_file_changed_just_now_is_read_again(tmp_path, opened):
    put(tmp_path / "old.png", caption="x")
    write_picture(tmp_path / "new.png", 8, 8, caption="x")
    scanned(tmp_path)
    opened.clear()
    # Of the same length and within one tick of the clock: only the time of the scan tells that it may have changed.
    stat = (tmp_path / "new.txt").stat()
    (tmp_path / "new.txt").write_text("y", encoding="utf-8")
    os.utime(tmp_path / "new.txt", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    records, _ = scanned(tmp_path)
    assert records[0].caption == "y"
    assert sorted(opened) == ["new.png", "new.txt"]


def test_an_unreadable_image_is_remembered_with_its_reason_until_the_reader_changes(images, opened, monkeypatch):
    (images / "b.png").write_bytes(b"no image")
    aged(images / "b.png")
    first = scanned(images)
    assert [path for path, _ in first[1].skipped] == [str(images / "b.png")]
    opened.clear()
    assert scanned(images) == first
    assert opened == []
    monkeypatch.setattr(dataset_index.PIL, "__version__", "0")
    scanned(images)
    assert opened == ["b.png"]


def test_what_the_system_refused_is_tried_again(tmp_path, monkeypatch):
    put(tmp_path / "a.png", caption="x")

    def refused(path):
        raise ImageError("the picture cannot be decoded", path) from PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(file_facts, "read_size", refused)
        assert scanned(tmp_path)[1].skipped
    assert scanned(tmp_path)[0][0].size == (30, 20)


def test_bad_captions_are_reported_every_time(tmp_path, opened):
    for name in ("a", "b", "c", "d", "e"):
        put(tmp_path / f"{name}.png", caption="")
    aged(tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").unlink()
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "c.txt").write_bytes(b"nul\0in it")
    (tmp_path / "d.txt").unlink()
    (tmp_path / "d.txt").symlink_to("nowhere")
    for name in ("a", "c"):
        aged(tmp_path / f"{name}.txt")
    first = scanned(tmp_path)
    assert [(r.key[-5:], r.caption) for r in first[0]] == [
        ("b.png", ""),
        ("c.png", "nul\0in it"),
        ("d.png", ""),
        ("e.png", ""),
    ]
    assert first[1].missing_captions == [str(tmp_path / "b.png"), str(tmp_path / "d.png")]
    assert "not UTF-8 (byte 3" in first[1].skipped[0].reason
    opened.clear()
    assert scanned(tmp_path) == first
    assert sorted(opened) == ["a.txt", "c.txt"]


def test_sources_and_caption_extensions_share_an_index(tmp_path, images, opened):
    for name in "ab":
        aged((images / f"{name}.txt").rename(images / f"{name}.caption"))
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"b": {"caption": "x"}, "c": {"caption": "y"}}), encoding="utf-8")

    def scan_all():
        found = [scanned(images, source=metadata_json, metadata_file=str(meta))[0]]
        return [*found, scanned(images)[0], scanned(images, caption_extension=".caption")[0]]

    opened.clear()
    first = scan_all()
    assert sorted(opened) == ["a.caption", "b.caption"]
    assert [record.size for record in first[0]] == [Size(31, 20), Size(32, 20)]
    opened.clear()
    assert scan_all() == first
    assert opened == []


def test_a_scan_that_is_interrupted_keeps_what_it_has_read(images, monkeypatch):
    (images / FILE_NAME).unlink()
    monkeypatch.setattr(many_files, "CHUNK", 1)
    real = file_facts.read_size
    read = []

    def stopping(path):
        if path.endswith("c.png"):
            raise KeyboardInterrupt
        read.append(os.path.basename(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(file_facts, "read_size", stopping)
        with pytest.raises(KeyboardInterrupt):
            scanned(images)
    assert read == ["a.png", "b.png"]
    monkeypatch.setattr(file_facts, "read_size", lambda path: read.append(os.path.basename(path)) or real(path))
    scanned(images)
    assert read == ["a.png", "b.png", "c.png"]


def put_cache(image, size, *, after=1, fingerprint="{}"):
    """A latents cache of the image that says `size`, made a second after or before the image last changed."""
    path = image.with_name(f"{image.stem}_{size[0]:04d}x{size[1]:04d}_sdxl.npz")
    entry = {"latents": np.zeros((4, 4, 4), np.float32), "original_size": np.array(size), "crop_ltrb": np.zeros(4)}
    write_arrays(path, entry | {"fingerprint": np.array(fingerprint)}, checksum_key="fingerprint_crc")
    moment = os.stat(image).st_ctime_ns + after * 1_000_000_000
    os.utime(path, ns=(moment, moment))
    return path


def test_sizes_come_from_the_names_of_newer_caches_of_our_own(tmp_path, opened):
    for name in ("sure.png", "é_0030x0020_sdxl.jpg", "old.png", "two.png", "shared.png", "shared.jpg", "foreign.png"):
        put(tmp_path / name)
    for name in ("sure.png", "é_0030x0020_sdxl.jpg", "shared.png"):
        put_cache(tmp_path / name, (31, 21))
    put_cache(tmp_path / "old.png", (31, 21), after=-1)
    put_cache(tmp_path / "two.png", (31, 21))
    put_cache(tmp_path / "two.png", (32, 22))
    np.savez(put_cache(tmp_path / "foreign.png", (31, 21)), latents=np.zeros(3))
    opened.clear()
    records, _ = scanned(tmp_path)
    by_cache = ["sure.png", "é_0030x0020_sdxl.jpg"]
    assert {record.key.split("/")[1] for record in records if record.size == (31, 21)} == set(by_cache)
    assert sorted(opened) == ["foreign.png", "old.png", "shared.jpg", "shared.png", "two.png"]
    opened.clear()
    assert scanned(tmp_path)[0] == records
    assert opened == []


def test_one_process_of_a_machine_writes(images, monkeypatch):
    (images / FILE_NAME).unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    scanned(images)
    assert not (images / FILE_NAME).exists()


@pytest.mark.parametrize("waiting", [1e9, 0.0])
def test_stamps_of_many_files_are_in_order_and_missing_ones_are_marked(tmp_path, monkeypatch, waiting):
    monkeypatch.setattr(many_files, "_WAITING", waiting)
    monkeypatch.setattr(many_files, "CHUNK", 20)
    monkeypatch.setattr(many_files, "BLOCK", 90)
    names = [f"{number:03d}" for number in range(200)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x" * number)
        aged(tmp_path / name)
    stats = [os.stat(tmp_path / name) for name in names]
    names.insert(150, "gone")
    stamps = file_stamps(tmp_path, names)
    assert stamps[150].tolist() == [-1, -1]
    expected = [[found.st_size, found.st_mtime_ns] for found in stats]
    assert np.delete(stamps, 150, axis=0).tolist() == expected
    assert file_stamps(tmp_path, []).shape == (0, 2)


NAMES = st.sampled_from(["a", "b_1_2_3_4", "b", "c d", "é_0100x0200_sdxl"])
ENDINGS = st.sampled_from([".png", ".JPG"])
CHANGES = st.one_of(
    st.tuples(st.just("image"), NAMES, ENDINGS, st.integers(1, 9)),
    st.tuples(st.just("broken"), NAMES, ENDINGS, st.just(0)),
    st.tuples(st.just("caption"), NAMES, st.just(".txt"), st.sampled_from(["", "x", "y", "x\n\ny", "z\0"])),
    st.tuples(st.just("latin"), NAMES, st.just(".txt"), st.just(0)),
    st.tuples(st.just("remove"), NAMES, st.sampled_from([".png", ".JPG", ".txt"]), st.just(0)),
    st.tuples(st.just("rename"), NAMES, st.sampled_from([".png", ".txt"]), NAMES),
    st.tuples(st.just("scan"), NAMES, ENDINGS, st.booleans()),
)


def apply(folder: Path, change) -> None:
    kind, name, ending, value = change
    path = folder / (name + ending)
    if kind == "image":
        Image.new("RGB", (value, 3)).save(path, "BMP")
    elif kind in ("broken", "latin"):
        path.write_bytes(b"\xe9")
    elif kind == "caption":
        path.write_text(value, encoding="utf-8")
    elif kind == "remove":
        path.unlink(missing_ok=True)
    elif kind == "rename" and path.exists():
        path.rename(folder / (value + ending))
    if kind in ("image", "broken", "latin", "caption"):
        aged(path)


@given(st.lists(CHANGES, max_size=25))
def test_after_any_changes_a_scan_with_the_index_finds_what_one_without_finds(changes):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        put(folder / "always.png")
        for change in [*changes, ("scan", "", "", True), ("scan", "", "", False)]:
            if change[0] == "scan":
                lines = change[3]
                expected = scanned(folder, use_index=False, enable_wildcard=lines)
                assert scanned(folder, enable_wildcard=lines) == expected
            else:
                apply(folder, change)


def test_a_run_keeps_its_indexes_below_the_cache_folder(tmp_path):
    put(tmp_path / "pictures" / "a.png")
    build_train_data([dataset(subset(tmp_path / "pictures"))], seed=1, cache_dir=tmp_path / "caches")
    assert [path.parent.parent.name for path in tmp_path.rglob(FILE_NAME)] == ["caches"]


def test_a_source_without_an_index_is_not_given_a_folder(tmp_path, monkeypatch):
    real = folders.scan

    def scan(subset, *, report):
        return real(subset, report=report, use_index=False)

    monkeypatch.setattr(folders, "scan", scan)
    put(tmp_path / "pictures" / "a.png")
    table, _ = assemble([dataset(subset(tmp_path / "pictures"))], cache_dir=tmp_path / "caches")
    assert len(table) == 1 and not list(tmp_path.rglob(FILE_NAME))

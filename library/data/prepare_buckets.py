"""The images of a metadata file and their buckets, and how both get into the file (cache_formats.md §3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from library.config.dataset_file import DatasetSpec
from library.data.assemble import policies_of
from library.data.buckets import UnplaceableImage
from library.data.metadata_tools import Metadata
from library.data.progress import progress_bar
from library.data.records import READ_ERRORS, ImageRecord, PlacedImage, ScanReport, Skipped
from library.data.table import ImageTable
from library.io.images import read_size
from library.sizes import Size


def entry_names(metadata: Mapping[str, object], images: Sequence[Path], *, root: Path, full_path: bool) -> list[str]:
    """The key of each image in `metadata`.

    That is its path with `full_path`, else its stem; but an entry that is there already and names the image in
    another way (with its extension, relative to `root`, or by its path) is the image's own and keeps its name.
    """
    names = []
    for path in images:
        usual = str(path) if full_path else path.stem
        relative = path.relative_to(root)
        forms = [usual, relative.as_posix(), str(path), str(path.resolve())]
        if path.parent == root:
            forms.append(path.stem)
        names.append(next((form for form in forms if form in metadata), usual))
    return names


def place_images(
    images: Sequence[Path], spec: DatasetSpec, *, root: Path, report: ScanReport, workers: int
) -> ImageTable:
    """The images in their buckets, sizes read from the headers by `workers` threads.

    Those that cannot be read or fit no bucket are listed in `report` and have no row. Captions are left empty.
    """
    return ImageTable(_placed(images, spec, root, report, workers))


def _placed(
    images: Sequence[Path], spec: DatasetSpec, root: Path, report: ScanReport, workers: int
) -> Iterator[PlacedImage]:
    policy = policies_of(spec)[0]
    with (
        ThreadPoolExecutor(workers) as pool,
        progress_bar(len(images), title=f"reading sizes of {root.name}", delay=2.0) as bar,
    ):
        for path, size in zip(images, pool.map(_size_or_reason, images), strict=True):
            bar.update()
            try:
                if isinstance(size, Skipped):
                    report.skipped.append(size)
                    continue
                placement = policy.place(size)
            except UnplaceableImage as reason:
                report.skipped.append(Skipped(str(path), str(reason)))
                continue
            key = f"{root.name}/{path.relative_to(root).as_posix()}"
            yield PlacedImage(ImageRecord(key, str(path), size, "", spec.subsets[0]), placement, 0)


def _size_or_reason(path: Path) -> Size | Skipped:
    try:
        return read_size(path)
    except READ_ERRORS as error:
        return Skipped.because_of(str(path), error)


def note_buckets(
    metadata: Metadata, images: Sequence[Path], names: Sequence[str], *, table: ImageTable
) -> tuple[int, list[str]]:
    """Set `train_resolution` and `image_size`, [w, h] each, of every image in use, adding entries that are missing.

    An image that is not in use keeps its entry, without these two, and gets none if it has none: nothing that was
    written by hand is lost, and nothing says that it can be trained on. Returns how many entries are new and the names
    that stand for several images.
    """
    rows = {table.paths.text(int(table.image_of[row])): row for row in table.rows.tolist()}
    before = len(metadata)
    for name in names:
        for fact in ("train_resolution", "image_size"):
            metadata.get(name, {}).pop(fact, None)
    for path, name in zip(images, names, strict=True):
        if (row := rows.get(str(path))) is None:
            continue
        entry = metadata.setdefault(name, {})
        entry["train_resolution"] = list(table.placement(row).bucket)
        entry["image_size"] = table.sizes[table.image_of[row]].tolist()
    shared = [name for name, count in Counter(names).items() if count > 1]
    return len(metadata) - before, shared


def without_image(metadata: Mapping[str, object], names: Collection[str]) -> list[str]:
    """The entries that none of the images has."""
    return sorted(metadata.keys() - set(names))

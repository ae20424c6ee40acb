"""The images of one folder, with captions from text files beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from library.config.dataset_file import SubsetSpec
from library.data.progress import progress_bar
from library.data.records import READ_ERRORS, ImageRecord, ScanReport, Skipped
from library.errors import UserError
from library.io.images import IMAGE_EXTENSIONS, read_size
from library.sizes import Size

SIZE_READERS = min(16, 4 * (os.cpu_count() or 1))
"""Threads that read image headers; the work is waiting for the disk."""

STEM_PIECES_WITH_FACE = 5
"""A stem of at least this many "_"-pieces may end in four numbers of a face box, which the caption file leaves out."""


def scan(subset: SubsetSpec, *, report: ScanReport) -> Iterator[ImageRecord]:
    """The readable images of `subset.image_dir`, sorted by name, sub-folders not entered.

    An image whose header cannot be read or whose caption is not UTF-8 is left out and listed in `report`; one
    without a caption file trains with the class tokens, or else with an empty caption and is listed too. Raises
    UserError when the folder is missing or holds no image.
    """
    folder = Path(subset.image_dir)
    paths = list_images(folder)
    for path, size in zip(paths, read_sizes(paths, title=folder.name), strict=True):
        if isinstance(size, Skipped):
            report.skipped.append(size)
            continue
        try:
            caption = read_caption(path, subset.caption_extension, all_lines=subset.enable_wildcard)
        except (UnicodeDecodeError, OSError) as error:
            report.skipped.append(Skipped(str(path), _caption_problem(error)))
            continue
        if caption is None:
            caption = subset.class_tokens
        if caption is None:
            report.missing_captions.append(str(path))
        key = f"{folder.name}/{path.name}"
        yield ImageRecord(key, str(path), size, caption or "", subset, subset.num_repeats, subset.loss_weight)


def list_images(folder: Path) -> list[Path]:
    """Image files of `folder` by extension (any case), sorted; hidden files are not images."""
    if not folder.is_dir():
        raise UserError("the image folder does not exist", where=str(folder), fix="check image_dir / train_data_dir")
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    paths = [folder / name for name in sorted(names) if Path(name).suffix.lower() in IMAGE_EXTENSIONS]
    if not paths:
        known = " ".join(sorted(IMAGE_EXTENSIONS))
        raise UserError(
            "the image folder holds no image",
            where=str(folder),
            fix=f"put images there (known extensions: {known}); sub-folders are not searched",
        )
    return paths


def read_caption(image: Path, extension: str, *, all_lines: bool = False) -> str | None:
    """The first line of the image's caption file, or all that are not empty, stripped; None without a file.

    Looks for `<stem><extension>`, then, for a stem that ends in four face-box numbers, for the stem without them.
    Raises UnicodeDecodeError when the file is not UTF-8 (a byte-order mark is allowed).
    """
    stems = [image.stem]
    pieces = image.stem.split("_")
    if len(pieces) >= STEM_PIECES_WITH_FACE:
        stems.append("_".join(pieces[:-4]))
    for stem in stems:
        path = image.with_name(stem + extension)
        if path.is_file():
            text = path.read_text(encoding="utf-8-sig").strip()
            lines = [line.strip() for line in text.splitlines()]
            return "\n".join([line for line in lines if line] if all_lines else lines[:1])
    return None


def read_sizes(paths: Sequence[Path], *, title: str) -> list[Size | Skipped]:
    """Sizes from the files' headers; Skipped for an image that cannot be opened."""
    with (
        ThreadPoolExecutor(SIZE_READERS) as pool,
        progress_bar(len(paths), title=f"reading sizes of {title}", delay=2.0) as bar,
    ):
        sizes = []
        for size in pool.map(_size_or_reason, paths):
            sizes.append(size)
            bar.update()
    return sizes


def _size_or_reason(path: Path) -> Size | Skipped:
    try:
        return read_size(path)
    except READ_ERRORS as error:
        return Skipped.because_of(str(path), error)


def _caption_problem(error: UnicodeDecodeError | OSError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"the caption file is not UTF-8 (byte {error.start}: {error.reason})"
    return f"the caption file cannot be read ({error.strerror})"

"""Sizes of images and lines of caption files: from the folder's index where it knows them, else from the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.data.cache_names import sizes_by_cache
from library.data.dataset_index import DatasetIndex, Table
from library.data.folder_listing import file_stamps, prefix_of
from library.data.many_files import in_chunks
from library.data.progress import progress_bar
from library.data.records import READ_ERRORS, Skipped
from library.io.images import read_size


class Found(NamedTuple):
    """What is known of the files asked for, row by row; `problems` says by name why one cannot be read."""

    table: Table
    problems: dict[str, str]


class _Fact(NamedTuple):
    """What one file said; `lasting` when it will say the same as long as its bytes are the same."""

    size: tuple[int, ...] = ()
    text: str = ""
    problem: str = ""
    lasting: bool = True


class _Ways(NamedTuple):
    """How to come by the facts: what the index knows, how to read a file, and what can be said without reading it."""

    known: Table
    read: Callable[[str], _Fact]
    infer: Callable[[list[str]], Mapping[str, tuple[int, ...]]]


def image_sizes(folder: Path, names: Sequence[str], *, index: DatasetIndex, listed: Sequence[str]) -> Found:
    """The sizes of the images `names` in `folder`, as `read_size` gives them; `listed` are all its files."""
    ways = _Ways(index.images, _image_fact, partial(sizes_by_cache, folder, listed=listed))
    table = _look_up("images", folder, names, ways=ways, index=index, listed=listed).table
    unreadable = np.flatnonzero(table.sizes[:, 0] == 0).tolist()
    return Found(table, {table.names[row]: table.texts[row] for row in unreadable})


def caption_texts(folder: Path, names: Sequence[str], *, index: DatasetIndex, listed: Sequence[str]) -> Found:
    """The lines of the caption files `names` in `folder`: stripped, those that are not empty, joined by line breaks."""
    ways = _Ways(index.captions, _caption_fact, lambda unknown: {})
    return _look_up("captions", folder, names, ways=ways, index=index, listed=listed)


def _look_up(
    kind: str, folder: Path, names: Sequence[str], *, ways: _Ways, index: DatasetIndex, listed: Sequence[str]
) -> Found:
    known, stamps = ways.known, file_stamps(folder, names)
    rows = known.rows_of(names, stamps)
    lasting = rows >= 0
    if lasting.all() and names == known.names:
        return Found(known, {})
    sizes = np.zeros((len(names), known.sizes.shape[1]), np.int32)
    sizes[lasting] = known.sizes[rows[lasting]]
    texts = [known.texts[row] if row >= 0 else "" for row in rows.tolist()]
    inferred = ways.infer([names[row] for row in np.flatnonzero(~lasting).tolist()])
    for row in np.flatnonzero(~lasting).tolist():
        if names[row] in inferred:
            sizes[row], lasting[row] = inferred[names[row]], True
    table, problems = Table(list(names), stamps, sizes, texts), {}
    unknown = np.flatnonzero(~lasting).tolist()
    paths = [prefix_of(folder) + names[row] for row in unknown]
    facts = _facts(ways.read, paths, title=f"{kind} of {folder.name}")
    num_read = 0
    try:
        for row, fact in zip(unknown, facts, strict=True):
            sizes[row], texts[row], lasting[row] = fact.size, fact.text, fact.lasting
            if fact.problem:
                problems[names[row]] = fact.problem
            num_read += 1
    finally:
        index.update(kind, table, lasting=lasting, listed=listed)
        if num_read < len(paths):  # stopped by Ctrl-C: the next start goes on from here
            index.save()
    return Found(table, problems)


def _facts(read: Callable[[str], _Fact], paths: list[str], *, title: str) -> Iterator[_Fact]:
    """What `read` says of each path, in order; a progress bar appears after two seconds."""
    with progress_bar(len(paths), title=f"reading {title}", unit="file", delay=2.0) as bar:
        for facts in in_chunks(partial(_read_all, read), paths):
            yield from facts
            bar.update(len(facts))


def _read_all(read: Callable[[str], _Fact], paths: Sequence[str]) -> list[_Fact]:
    return [read(path) for path in paths]


def _image_fact(path: str) -> _Fact:
    try:
        return _Fact(read_size(path))
    except READ_ERRORS as error:
        reason = Skipped.because_of(path, error).reason
        cause = error if isinstance(error, OSError) else error.__cause__
        # With an error number the system refused (permissions, a dead disk), which says nothing about the file.
        refused = isinstance(cause, OSError) and cause.errno is not None
        return _Fact((0, 0), reason, lasting=not refused)


def _caption_fact(path: str) -> _Fact:
    try:
        with open(path, "rb", buffering=0) as file:
            text = file.readall().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"the caption file is not UTF-8 (byte {error.start}: {error.reason})"
        return _Fact(problem=problem, lasting=False)
    except OSError as error:
        return _Fact(problem=f"the caption file cannot be read ({error.strerror})", lasting=False)
    return _Fact(text="\n".join(stripped for line in text.splitlines() if (stripped := line.strip())))

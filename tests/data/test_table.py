"""The columns of a run give back what went in, and know what is in use."""

import os
import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from library.data.assemble import balance_reg
from library.data.buckets import Placement
from library.data.records import FileStamp, ImageRecord, PlacedImage
from library.data.table import ImageTable, TextColumn
from library.sizes import Size
from tests.data.specs import subset

PLAIN, REG = subset("plain"), subset("reg", is_reg=True, num_repeats=2, loss_weight=0.5)
texts = st.text(max_size=8)


@st.composite
def image_lists(draw):
    """Placed images, some of them at two resolutions."""
    placed = []
    for number in range(draw(st.integers(0, 6))):
        record = ImageRecord(
            key=f"{number}{draw(texts)}",
            path=draw(texts),
            size=Size(draw(st.integers(1, 9999)), draw(st.integers(1, 9999))),
            caption=draw(texts),
            subset=draw(st.sampled_from([PLAIN, REG])),
            repeats=draw(st.integers(1, 3)),
            weight=draw(st.floats(0, 2)),
            tags=draw(st.none() | texts),
            mask=draw(st.none() | texts),
            control=draw(st.none() | texts),
            stamp=draw(st.none() | st.just(FileStamp(3, 4))),
        )
        for side in draw(st.sampled_from([[64], [64, 96]])):
            placement = Placement(Size(side, side), Size(side, side), draw(st.sampled_from([0.0, 0.5])))
            placed.append(PlacedImage(record, placement, draw(st.integers(0, 1))))
    return placed


@given(st.lists(st.none() | st.text()))
def test_a_column_holds_any_text_and_none(values):
    column = TextColumn(values)
    assert list(column) == values and column[:] == values and len(column) == len(values)


@given(image_lists())
def test_rows_come_back_as_they_went_in(placed):
    table = ImageTable(placed)
    assert list(table) == placed
    assert list(pickle.loads(pickle.dumps(table))) == placed
    assert table.num_images == len({image.record.key for image in placed})
    assert [table.record(int(image)) for image in table.image_of] == [image.record for image in placed]


def table_of(*records, dataset=0):
    placement = Placement(Size(64, 64), Size(64, 64), 0.0)
    return ImageTable(PlacedImage(record, placement, dataset) for record in records)


def test_images_that_are_dropped_or_not_needed_are_not_in_use():
    records = [ImageRecord(str(n), f"p{n}", Size(64, 64), "", REG if n > 1 else PLAIN) for n in range(5)]
    table = table_of(*records)
    balance_reg(table)
    assert table.repeats.tolist() == [1, 1, 2, 0, 0]
    assert table.images.tolist() == table.rows.tolist() == [0, 1, 2]
    table.drop({"p0"})
    assert table.images.tolist() == [1, 2] and len(table) == 5


def test_regularisation_is_balanced_again_without_images_that_are_in_no_cache():
    records = [ImageRecord(str(n), f"p{n}", Size(64, 64), "", REG if n > 3 else PLAIN) for n in range(8)]
    table = table_of(*records)
    balance_reg(table)
    assert table.repeats.tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    table.drop({"p5"})
    balance_reg(table)
    assert table.repeats[[4, 6, 7]].tolist() == [4, 0, 0]


def test_a_table_is_small():
    records = [
        ImageRecord(f"folder/{n:06}.png", f"/data/folder/{n:06}.png", Size(9, 9), "x" * 50, PLAIN) for n in range(99)
    ]
    columns = vars(table_of(*records)).values()
    size = sum(part.nbytes for part in columns if isinstance(part, np.ndarray))
    size += sum(part.num_bytes for part in columns if isinstance(part, TextColumn))
    assert size / 99 < 400


def test_files_are_known_by_folder_and_name():
    paths = ["/a/b/x.png", "/a/c/x.png", "/a/b/y.png", "y.png", "/a//b/x.png", "/x.png"]
    place = Placement(Size(64, 64), Size(64, 64), 0.0)
    table = ImageTable([PlacedImage(ImageRecord(path, path, Size(1, 1), "", PLAIN), place, 0) for path in paths])
    folders = [table.folders[number] for number in table.folder_of.tolist()]
    assert [os.path.join(folder, os.path.basename(path)) for folder, path in zip(folders, paths, strict=True)] == paths
    assert table.name_ids[0] == table.name_ids[1] != table.name_ids[2] == table.name_ids[3]
    assert len(set(table.path_ids.tolist())) == len(paths)


@given(st.lists(st.none() | st.text(max_size=3), max_size=9), st.lists(st.none() | st.text(max_size=3), max_size=9))
def test_a_text_column_gives_back_what_was_put_in(first, second):
    column = TextColumn(first)
    column.extend(second)
    assert column[:] == first + second and len(column) == len(first + second)
    assert column.is_there.tolist() == [text is not None for text in first + second]

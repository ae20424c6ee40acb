"""The sheet of all sample pictures of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.inference.sheet import GAP, PAPER
from library.inference.writer import save_png
from library.training.contact_sheet import CELL, HEAD, MARGIN, ContactSheet, Place, place_of, thinned

COLOURS = {(0, 0): (255, 0, 0), (0, 1): (0, 255, 0), (7, 0): (0, 0, 255), (7, 1): (9, 9, 9)}


def _picture(colour, size=(512, 256)):
    return Image.new("RGB", size, colour)


def _sheet(folder):
    return ContactSheet(folder, "net_", ["first prompt", "second"])


def test_rows_are_prompts_and_columns_times(tmp_path):
    sheet = _sheet(tmp_path)
    for (step, prompt), colour in COLOURS.items():
        sheet.add(Place(step, prompt), _picture(colour))
    sheet.write()
    with Image.open(tmp_path / "net_grid.png") as drawn:
        assert drawn.size == (MARGIN + 2 * (CELL + GAP), HEAD + 2 * (CELL // 2 + GAP))
        for column, step in enumerate((0, 7)):
            for row in (0, 1):
                at = (MARGIN + column * (CELL + GAP) + 5, HEAD + row * (CELL // 2 + GAP) + 5)
                assert drawn.getpixel(at) == COLOURS[step, row]


def test_a_resumed_run_takes_up_its_own_pictures_and_a_new_one_none(tmp_path):
    for (step, prompt), colour in COLOURS.items():
        name = f"net_{step:06d}_{prompt:02d}_20260101000000.png"
        save_png(_picture(colour), tmp_path / name, Place(step, prompt).text())
    save_png(_picture((1, 1, 1)), tmp_path / "net_000003_00_2.png", {"prompt": "no place"})
    (tmp_path / "net_000004_00_2.png").write_bytes(b"torn")
    before = _sheet(tmp_path)
    before.take_up(7)
    before.write()
    whole = (tmp_path / "net_grid.png").read_bytes()
    again = _sheet(tmp_path)
    for place, colour in COLOURS.items():
        again.add(Place(*place), _picture(colour))
    again.write()
    assert (tmp_path / "net_grid.png").read_bytes() == whole
    earlier, new = _sheet(tmp_path), _sheet(tmp_path)
    earlier.take_up(6)
    new.take_up(0)
    assert set(earlier._small) == {(0, 0), (0, 1)} and not new._small


def test_a_missing_picture_leaves_its_cell_blank(tmp_path):
    sheet = _sheet(tmp_path)
    sheet.add(Place(0, 0), _picture((1, 2, 3)))
    sheet.add(Place(5, 1), _picture((4, 5, 6)))
    sheet.add(Place(5, 2), _picture((7, 8, 9)))  # of a prompt that is no longer there
    sheet.write()
    with Image.open(sheet.path) as drawn:
        assert drawn.getpixel((MARGIN + CELL + GAP + 5, HEAD + 5)) == PAPER


def test_the_place_is_read_from_the_text_of_the_picture(tmp_path):
    save_png(_picture((0, 0, 0)), tmp_path / "p.png", Place(12, 3).text())
    with Image.open(tmp_path / "p.png") as picture:
        assert place_of(picture) == (12, 3)
    assert place_of(_picture((0, 0, 0))) is None


@given(st.integers(0, 200), st.integers(2, 60))
def test_thinning_keeps_the_ends_and_the_order(count, most):
    kept = thinned(range(count), most)
    assert len(kept) == min(count, most) and kept == sorted(set(kept))
    assert not count or (kept[0], kept[-1]) == (0, count - 1)


@pytest.mark.parametrize("prompt", ["", "word " * 200, "x" * 300])
def test_any_prompt_can_stand_beside_its_row(tmp_path, prompt):
    sheet = ContactSheet(tmp_path, "", [prompt])
    sheet.add(Place(1, 0), _picture((1, 1, 1), (64, 64)))
    sheet.write()
    assert sheet.path.name == "grid.png" and sheet.path.exists()

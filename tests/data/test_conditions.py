"""Condition images: what each kind shows, and a tool that can be stopped, goes on, and leaves bad pictures out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.config.conditions import KINDS, Settings
from library.data.conditions import MAKERS, blur, canny, grey, make_conditions, palette, soft_edges
from library.errors import UserError
from tests.data.specs import write_picture
from tools import make_conditions as tool


def step(height: int = 64, width: int = 96, at: int = 40, *, levels=(40, 200)) -> np.ndarray:
    """Dark on the left, light on the right."""
    picture = np.full((height, width, 3), levels[0], np.uint8)
    picture[:, at:] = levels[1]
    return picture


@given(
    kind=st.sampled_from(sorted(KINDS)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 9),
)
def test_a_condition_has_its_pictures_size_and_is_a_picture(kind, size, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    before = picture.copy()
    made = MAKERS[kind](picture, Settings())
    assert set(MAKERS) == set(KINDS)
    assert made.shape == picture.shape and made.dtype == np.uint8
    assert np.array_equal(picture, before)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_picture_of_one_colour_has_no_edges_and_else_stays(kind):
    picture = np.full((40, 56, 3), (10, 90, 200), np.uint8)
    made = MAKERS[kind](picture, Settings())
    wanted = {"canny": (0, 0, 0), "soft": (0, 0, 0), "grey": (79, 79, 79)}.get(kind, (10, 90, 200))
    assert np.array_equal(made, np.broadcast_to(np.uint8(wanted), made.shape))


def test_edges_stand_where_the_picture_changes():
    thin = canny(step(), Settings())
    assert set(np.unique(thin)) == {0, 255}
    assert set(np.nonzero(thin[32, :, 0])[0]) <= {38, 39, 40, 41} and thin[32].any()
    assert not canny(step(levels=(100, 110)), Settings()).any(), "below the thresholds"
    assert canny(step(levels=(100, 110)), Settings(low=10, high=20)).any()
    soft = soft_edges(step(), Settings())
    assert soft.max() == 255 and soft[32].argmax() // 3 in (39, 40)
    two = step(at=20, levels=(0, 200))
    two[:, 60:] = 250  # an edge a quarter as strong
    row = soft_edges(two, Settings())[32, :, 0].astype(int)
    assert row[56:64].max() == pytest.approx(255 / 4, abs=2) and row[36:44].max() == 0
    red_on_green = step()
    red_on_green[:, :40], red_on_green[:, 40:] = (200, 0, 0), (0, 102, 0)  # of one brightness
    assert soft_edges(red_on_green, Settings()).max() == 255


def test_grey_blur_and_palette_keep_what_they_say():
    picture = np.random.default_rng(3).integers(0, 256, (64, 128, 3), np.uint8)
    expected = picture.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(grey(picture, Settings())[..., 1] - expected).max() <= 1
    smooth = blur(picture, Settings(blur=0.1)).astype(float)
    assert smooth.std() < picture.std() / 5 and abs(smooth.mean() - picture.mean()) < 2
    cells = palette(picture, Settings(cells=4))
    assert np.array_equal(cells[:16, :16], np.broadcast_to(cells[0, 0], (16, 16, 3)))
    assert np.abs(cells[20, 100] - picture[16:32, 96:112].mean(axis=(0, 1))).max() <= 1
    assert len(np.unique(cells.reshape(-1, 3), axis=0)) == 4 * 8


def test_an_enlargement_has_the_same_blur():
    small = step(64, 64, 32)
    large = np.array(Image.fromarray(small).resize((256, 256), Image.Resampling.NEAREST))
    again = np.array(Image.fromarray(blur(large, Settings(blur=0.05))).resize((64, 64), Image.Resampling.BOX))
    assert np.abs(again.astype(int) - blur(small, Settings(blur=0.05))).max() <= 6


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    write_picture(folder / "a.jpg", 40, 30, seed=1)
    write_picture(folder / "deep" / "b.webp", 30, 40, seed=2)
    (folder / "bad.png").write_bytes(b"no picture")
    write_picture(folder / "c.png", 20, 20, seed=3)
    write_picture(folder / "c.webp", 20, 20, seed=4)
    return folder


def test_the_tool_goes_on_where_it_was_and_tells_what_it_left_out(pictures, tmp_path, capsys):
    target = pictures / "edges"  # may lie among the pictures: it is not one of them
    assert tool.main([str(pictures), str(target), "--kind", "soft"]) == 0
    told = capsys.readouterr().out
    assert "3 conditions written, 2 pictures left out" in told and "bad.png: " in told
    assert "c.webp: c.png has the same stem" in told
    names = sorted(str(path.relative_to(target)) for path in target.rglob("*.*"))
    assert names == ["a.png", "c.png", "deep/b.png"]
    assert Image.open(target / "deep" / "b.png").size == (30, 40)
    (target / "a.png").unlink()
    (target / "c.png").write_bytes(b"mine")
    made = make_conditions(pictures, target, kind="soft")
    assert (made.written, made.kept) == (1, 2) and (target / "c.png").read_bytes() == b"mine"
    assert make_conditions(pictures, target, kind="soft", overwrite=True).written == 3
    assert Image.open(target / "c.png").size == (20, 20)


def test_folders_that_cannot_be_are_told(pictures, tmp_path, capsys):
    for source, target, what in (
        (pictures, pictures, "take the pictures' place"),
        (tmp_path / "nowhere", tmp_path / "out", "no such folder"),
        (tmp_path / "empty", tmp_path / "out", "holds no picture"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=what):
            make_conditions(source, target, kind="grey")
    with pytest.raises(SystemExit):
        tool.main([str(pictures), str(tmp_path / "out"), "--kind", "canny", "--cells", "0"])
    for name in ("a.jpg", "deep/b.webp", "c.png", "c.webp"):
        (pictures / name).unlink()
    assert tool.main([str(pictures), str(tmp_path / "out"), "--kind", "grey"]) == 1
    assert "0 conditions written, 1 pictures left out" in capsys.readouterr().out

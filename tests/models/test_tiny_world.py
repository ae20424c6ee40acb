"""The drawn world of the tiny SDXL and its scorer: they judge every learning test, so they must be right."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.tiny import scorer, world  # noqa: E402

SIZES = [(128, 128), (96, 160), (160, 96)]


def test_scorer_is_right_on_every_drawn_plain_picture():
    rng = np.random.default_rng(0)
    for index in range(300):
        width, height = SIZES[index % 3]
        scene = world.sample_scene(rng, width=width, height=height, plain=True)
        expected = (scene.colour, scene.shape, scene.background)
        assert scorer.classify(world.render(rng, scene)) == expected


def test_scorer_is_right_through_noise_and_blur():
    import cv2

    rng = np.random.default_rng(1)
    asked, pictures = [], []
    for _ in range(100):
        scene = world.sample_scene(rng, plain=True)
        rgb = cv2.GaussianBlur(world.render(rng, scene), (5, 5), 1.5).astype(np.float64)
        pictures.append(np.clip(rgb + rng.normal(0, 6, rgb.shape), 0, 255).astype(np.uint8))
        asked.append(scorer.Answer(scene.colour, scene.shape, scene.background))
    assert scorer.score(pictures, asked)["all"] >= 0.97


def test_score_counts_each_part_by_itself():
    scene = world.Scene("red", "circle", "blue")
    picture = world.render(np.random.default_rng(0), scene)
    asked = [scorer.Answer("red", "circle", "blue"), scorer.Answer("red", "square", "blue")]
    result = scorer.score([picture, picture], asked)
    assert result == {"colour": 1.0, "shape": 0.5, "background": 1.0, "all": 0.5}


def test_empty_picture_has_no_figure():
    blank = np.full((128, 128, 3), world.PALETTE["yellow"], np.uint8)
    assert scorer.classify(blank) == ("", "", "yellow")


@pytest.mark.parametrize("seed", range(5))
def test_drawing_is_a_pure_function_of_the_generator(seed):
    first, second = (world.draw(np.random.default_rng(seed), width=160, height=96) for _ in range(2))
    assert np.array_equal(first[0], second[0]) and first[1:] == second[1:]
    assert first[0].shape == (96, 160, 3) and first[0].dtype == np.uint8
    assert first[2][4:] == (96, 160)
    other = world.draw(np.random.default_rng(seed + 1000), width=160, height=96)
    assert not np.array_equal(first[0], other[0])


def test_held_out_pairs_are_never_drawn_and_held_out_prompts_ask_only_for_them():
    rng = np.random.default_rng(3)
    scenes = [world.sample_scene(rng) for _ in range(2000)]
    drawn = {(s.colour, s.shape) for s in scenes}
    assert not drawn & world.HELD_OUT_PAIRS
    assert len(drawn) == len(world.COLOURS) * len(world.SHAPES) - len(world.HELD_OUT_PAIRS)
    assert all(s.colour != s.background for s in scenes)
    assert {a[:2] for a in scorer.prompts(0, 20, held_out=True)} == world.HELD_OUT_PAIRS


def test_size_words_order_the_area_of_the_figure():
    rng = np.random.default_rng(4)
    areas = {}
    for word in world.RADIUS:
        scene = world.place(rng, world.Scene("red", "square", "blue", size_word=word), 128, 128)
        areas[word] = world.figure_mask(scene).mean()
    assert areas["small"] < 0.5 * areas[""] < 0.5 * areas["big"]


def test_concept_share_is_nothing_in_the_ordinary_world():
    rng = np.random.default_rng(5)
    for _ in range(400):
        assert max(scorer.concept_share(world.draw(rng)[0])) < 0.002


def test_concept_share_counts_no_mix_of_two_palette_colours():
    shares = np.linspace(0, 1, 41)[:, None]
    jitter = np.array(list(itertools.product((-8, 0, 8), repeat=3)))[:, None]
    for first, second in itertools.combinations(world.PALETTE.values(), 2):
        mixes = np.array(first) * (1 - shares) + np.array(second) * shares
        picture = np.clip(mixes[None] + jitter, 0, 255).astype(np.uint8)
        assert scorer.concept_share(picture) == (0, 0), (first, second)


@pytest.mark.parametrize("background", world.COLOURS)
def test_concept_share_sees_the_concept_on_every_background(background):
    magenta, lime = scorer.concept_share(world.draw_concept(np.random.default_rng(6), background))
    assert magenta > 0.12 and lime > 0.02


def test_every_caption_is_made_of_words_of_the_vocabulary():
    rng = np.random.default_rng(7)
    known = {piece for word in world.vocabulary() for piece in word.split()}
    for _ in range(1000):
        assert set(world.draw(rng)[1].replace(",", " , ").split()) <= known


def test_committed_demo_data_is_what_the_script_draws(tmp_path):
    from tools.tiny.sheet import write_concept

    write_concept(tmp_path, seed=0)
    committed = ROOT / "demo" / "dataset" / "10_zxq"
    kept = [f for f in committed.iterdir() if f.suffix in (".png", ".txt")]  # a run may leave caches beside them
    assert sorted(f.name for f in kept) == sorted(f.name for f in tmp_path.iterdir())
    for text in tmp_path.glob("*.txt"):
        assert (committed / text.name).read_text() == text.read_text()
    import cv2

    for picture in tmp_path.glob("*.png"):
        drawn, there = (cv2.imread(str(folder / picture.name)).astype(int) for folder in (tmp_path, committed))
        assert np.abs(drawn - there).max() <= 1

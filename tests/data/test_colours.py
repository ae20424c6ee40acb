"""Changes of colour: how often, how large, and reproducible from the sample's own generator."""

import random
from collections import Counter

import cv2
import numpy as np
import torch

from library.data.colours import ColourShift, draw_colours, shift_colours
from library.data.dataset import build_train_data
from tests.data.specs import dataset, picture, subset, write_folder


def test_a_third_of_the_visits_change_half_of_them_by_hue():
    drawn = [draw_colours(random.Random(seed)) for seed in range(6000)]
    kinds = Counter("none" if shift is None else "hue" if shift.hue else "gamma" for shift in drawn)
    assert abs(kinds["none"] / 6000 - 0.67) < 0.02 and abs(kinds["hue"] / kinds["gamma"] - 1) < 0.15
    shifts = [shift for shift in drawn if shift]
    assert 7.9 < max(shift.hue for shift in shifts) <= 8 and -8 <= min(shift.hue for shift in shifts) < -7.9
    assert 1.049 < max(shift.gamma for shift in shifts) <= 1.05 and 0.95 <= min(s.gamma for s in shifts) < 0.951


def test_a_turn_of_the_hue_moves_red_towards_yellow_and_back_towards_magenta():
    red = np.full((2, 2, 3), (255, 0, 0), dtype=np.uint8)
    warm, cold = (shift_colours(red, ColourShift(hue=hue))[0, 0] for hue in (8.0, -8.0))
    assert warm[1] > warm[2] == 0 and cold[2] > cold[1] == 0
    hues = [cv2.cvtColor(shift_colours(red, ColourShift(hue=h)), cv2.COLOR_RGB2HSV)[0, 0, 0] for h in (8.0, -8.0)]
    assert hues == [8, 172]


def test_gamma_is_a_power_of_the_values_and_clips():
    image = np.array([[[0, 128, 255]]], dtype=np.uint8)
    assert shift_colours(image, ColourShift(gamma=1.05))[0, 0].tolist() == [0, int(128**1.05), 255]
    assert shift_colours(image, ColourShift(gamma=0.95))[0, 0].tolist() == [0, int(128**0.95), int(255**0.95)]


def test_shapes_and_types_stay():
    image = picture(40, 24)
    for shift in (ColourShift(hue=3.0), ColourShift(gamma=0.97)):
        changed = shift_colours(image, shift)
        assert changed.shape == image.shape and changed.dtype == np.uint8 and not np.array_equal(changed, image)


def test_training_sees_other_colours_in_some_visits_and_the_same_ones_again(tmp_path):
    folder = write_folder(tmp_path / "pictures")

    def pixels(**changes):
        data = build_train_data([dataset(subset(folder, num_repeats=4, **changes))], seed=5)
        return {
            key: row
            for group in data.epoch(0)
            for batch in group.micro_batches
            for key, row in zip(batch.keys, batch.pixels_B3HW, strict=True)
        }

    plain, changed, again = pixels(), pixels(color_aug=True), pixels(color_aug=True)
    differs = [not torch.equal(plain[key], changed[key]) for key in plain]
    assert 0 < sum(differs) < len(differs)
    assert all(torch.equal(changed[key], again[key]) for key in plain)

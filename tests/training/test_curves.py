"""The picture of a run's curves."""

import json
import math

import numpy as np
from PIL import Image

from library.training import curves


def _write(path, steps, **extra):
    with path.open("w") as file:
        for step in range(1, steps + 1):
            record = {"step": step, "epoch": 1, "loss": 1 / step, "loss_average": 1.0, "grad_norm": 0.5, **extra}
            if step == 7:
                record |= {"loss": math.nan, "grad_norm": math.inf, "skipped": 1.0, "images": ["a.png"]}
            file.write(json.dumps(record) + "\n")
    return path


def _colours(picture):
    return {tuple(pixel) for pixel in np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)}


def test_a_run_becomes_a_picture_with_a_panel_for_each_kind_of_number(tmp_path):
    log, picture = tmp_path / "net-log.jsonl", tmp_path / "net-curves.png"
    assert curves.draw_curves(_write(log, 30), picture)
    plain = Image.open(picture)
    numbers = {"lr/unet": 1e-4, "loss_band/000-099": 0.3, "loss/validation/held_out": 0.2}
    assert curves.draw_curves(_write(log, 30, **numbers), picture)
    full = Image.open(picture)
    assert full.size[0] == plain.size[0] == 1200
    assert full.size[1] > 2 * plain.size[1], "one row of two panels, then three"
    assert (31, 78, 121) in _colours(picture), "the line of the running mean"


def test_a_short_run_has_no_picture(tmp_path):
    assert not curves.draw_curves(_write(tmp_path / "log", curves.MIN_STEPS - 1), tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_series_come_from_records_of_all_kinds_and_survive_a_torn_line(tmp_path):
    log = _write(tmp_path / "log", 3)
    log.write_text(log.read_text() + '{"step": 3, "epoch": 1, "loss/validation/gap": 0.25}\n{"step": 4, "lo')
    series = curves.read_series(log)
    assert series["loss"][0].tolist() == [1, 2, 3]
    assert [column.tolist() for column in series["loss/validation/gap"]] == [[3], [0.25]]


def test_thinning_keeps_means_and_leaves_out_what_is_not_finite():
    steps = np.arange(1.0, 11.0)
    values = np.array([1, 3, np.nan, 5, np.inf, np.nan, 2, 2, 8, 8], float)
    thin_steps, thin_values = curves.thinned((steps, values), points=5)
    assert thin_steps.tolist() == [1.5, 3.5, 5.5, 7.5, 9.5]
    np.testing.assert_array_equal(thin_values, [2, 5, np.nan, 2, 8])
    long = (np.arange(10_001.0), np.ones(10_001))
    assert len(curves.thinned(long)[0]) <= curves.MAX_POINTS
    assert curves.thinned((steps, values))[1] is values

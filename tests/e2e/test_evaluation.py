"""Validation, sample pictures and averaged weights look at a run and never change it."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.e2e.conftest import copy_log

HELD = ["--validation_split=0.3", "--max_train_steps=6", "--network_dropout=0.1", "--save_state"]
SEEN = [
    "--validate_every_n_steps=2",
    "--validate_at_first",
    "--use_ema",
    "--ema_decay=0.9",
    "--validate_with_ema",
    "--sample_every_n_steps=3",
    "--sample_at_first",
    "--sample_with_ema",
    "--sample_grid",
]


def _records(output):
    """Records of the steps and records of the validation, without what depends on the machine."""
    lines = [json.loads(line) for line in (output / "net-log.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in ("time", "images_per_second")} for line in lines]
    return [r for r in kept if "loss" in r], [r for r in kept if "loss" not in r]


def _equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle --w 64 --h 64 --s 2\na blue square --w 64 --h 64 --s 2 --d 5\n")
    return path


@pytest.mark.e2e
def test_looking_at_a_run_changes_nothing_and_resuming_it_is_exact(train, prompts, capfd):
    plain = train("plain", *HELD, "--max_data_loader_n_workers=2", "--validate_every_n_epochs=1000")
    flags = [*HELD, *SEEN, f"--sample_prompts={prompts}", "--ema_update_interval=2"]
    whole = train("whole", *flags, "--save_every_n_steps=3")
    steps, validations = _records(whole)
    assert steps == _records(plain)[0] and len(steps) == 6
    assert _equal(load_file(plain / "net.safetensors"), load_file(whole / "net.safetensors"))
    assert "no validation loss is computed" not in capfd.readouterr().err

    # Two images are held out, ten repeats of five are left: five batches of 2 and 1 an epoch.
    assert [record["step"] for record in validations] == [0, 2, 4, 5, 6][: len(validations)] or validations
    resumed = whole.parent / "resumed"
    copy_log(whole, resumed)
    (resumed / "sample").mkdir()
    for path in (whole / "sample").glob("net_*_0?_*.png"):
        (resumed / "sample" / path.name).write_bytes(path.read_bytes())
    train("resumed", *flags, f"--resume={whole / 'net-step00000003-state'}")
    assert _records(resumed) == (steps, validations)
    for name in ("net.safetensors", "net-ema.safetensors"):
        assert _equal(load_file(whole / name), load_file(resumed / name))
    first, second = (
        torch.load(folder / "net-state" / "ema.pt", weights_only=True)["average"] for folder in (whole, resumed)
    )
    assert _equal(first, second)
    assert (whole / "sample" / "net_grid.png").read_bytes() == (resumed / "sample" / "net_grid.png").read_bytes()
    names = {re.sub(r"_\d{14}", "", path.name) for path in (whole / "sample").iterdir()}
    assert {"net_grid.png", "net_000003_01_5.png"} <= names and len(names) == 7
    sheet = Image.open(whole / "sample" / "net_grid.png")
    assert sheet.width > 200 + 3 * 64 and sheet.height > 2 * 64

"""A run that is watched, asked for things, and meets broken images and a full disk."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sdxl_train_network
from library.config.cli import parse
from library.training import saving
from library.training.bands import NAMES
from library.training.metrics import MACHINE_KEYS
from library.training.requests import SAMPLE, SAVE, STOP, RequestFiles
from library.training.step import TrainStep
from tests.e2e.conftest import arguments


def _ask(monkeypatch, wishes):
    """Touch the named files when the steps before them are done, as a user would."""
    looks = [0]
    real = RequestFiles.poll

    def poll(self):
        looks[0] += 1
        for name in wishes.get(looks[0], ()):
            (self.folder / name).touch()
        self._next = float("-inf")
        return real(self)

    monkeypatch.setattr(RequestFiles, "poll", poll)


def _records(output):
    return [json.loads(line) for line in (output / "net-log.jsonl").read_text().splitlines()]


@pytest.mark.e2e
def test_a_run_is_logged_drawn_and_answers_what_is_asked_of_it(train, tmp_path, pictures, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2 --d 1")
    _ask(monkeypatch, {3: [SAVE], 4: [SAMPLE], 21: [STOP]})
    flags = ["--max_train_steps=40", "--log_every_n_steps=4", f"--sample_prompts={prompts}", "--log_config"]
    output = train("out", *flags)

    records = _records(output)
    assert [record["step"] for record in records] == list(range(1, 22))
    assert all(record.keys() >= {*MACHINE_KEYS, "grad_norm", "skipped", "not_finite"} for record in records)
    assert 0 <= records[-1]["data_wait"] <= 1 and records[-1]["peak_memory_gib"] > 0
    banded = [record["step"] for record in records if record.keys() & set(NAMES)]
    assert banded == [4, 8, 12, 16, 20], "the interval that the stop cut short is told when the run goes on"
    for record in records:
        assert all(0 < record[name] < 10 for name in record.keys() & set(NAMES))

    names = sorted(each.name for each in output.iterdir())
    assert names == [
        "logs", "net-config.toml", "net-curves.png", "net-log.jsonl",
        "net-step00000003-state", "net-step00000003.safetensors",
        "net-step00000021-state", "net-step00000021.safetensors", "sample",
    ]  # fmt: skip
    (picture,) = (output / "sample").iterdir()
    assert picture.name.startswith("net_000004_00_")
    again = parse("sdxl_train_network", ["--config_file", str(output / "net-config.toml")])
    first = parse("sdxl_train_network", arguments(pictures, output, *flags))
    assert again.flat() == first.flat(), "the run can be started again from the file beside its log"


def _break(monkeypatch, *images):
    """Make the loss of some images NaN, and leave its gradient finite."""
    real = TrainStep.forward

    def forward(self, batch, draw):
        out = real(self, batch, draw)
        bad_B = torch.tensor([math.nan if Path(key.record).stem in images else 0.0 for key in batch.keys])
        return out._replace(loss=out.loss + bad_B[: batch.num_real].sum(), loss_B=out.loss_B + bad_B)

    monkeypatch.setattr(TrainStep, "forward", forward)


@pytest.mark.e2e
def test_a_run_of_broken_steps_ends_saved_with_the_weights_it_began_with(tmp_path, pictures, monkeypatch, capfd):
    _break(monkeypatch, *(f"p{index}" for index in range(7)))
    output = tmp_path / "out"
    flags = ("--max_train_steps=9", "--max_nonfinite_steps=3", "--log_every_n_steps=2")
    assert sdxl_train_network.main(arguments(pictures, output, *flags)) == 2
    told = capfd.readouterr().err
    assert "the last 4 steps had a loss or gradient that is not finite" in told and "lower learning rate" in told
    assert f"step 1 (loss; images: {pictures}" in told
    assert [record["skipped"] for record in _records(output)] == [1.0] * 4
    weights = load_file(output / "net-step00000004.safetensors")
    assert all(not weights[name].any() for name in weights if "lora_up" in name)
    assert (output / "net-step00000004-state" / "state.json").exists()


@pytest.mark.e2e
def test_one_broken_image_is_named_and_a_full_disk_costs_no_training(tmp_path, pictures, monkeypatch, capfd):
    _break(monkeypatch, "p3")
    monkeypatch.setattr(saving.time, "sleep", lambda seconds: None)
    real = os.replace

    def replace(source, target):
        if str(target).endswith(("net-step00000004.safetensors", "net.safetensors")):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr("library.io.atomic.os.replace", replace)
    output = tmp_path / "out"
    flags = ("--max_train_steps=7", "--save_every_n_steps=2", "--save_state_on_train_end")
    assert sdxl_train_network.main(arguments(pictures, output, *flags)) == 2
    told = capfd.readouterr().err
    assert "net-step00000004.safetensors could not be saved after 4 tries" in told and "training goes on" in told
    assert "net.safetensors could not be saved after 4 tries: no space left on the disk" in told

    records = _records(output)
    assert [record["step"] for record in records] == list(range(1, 8))
    broken = [record for record in records if record["skipped"]]
    assert 0 < len(broken) < 7
    for record in records:
        assert record.get("images") == ([str(pictures / "2_thing" / "p3.png")] if record["skipped"] else None)
    names = {each.name for each in output.iterdir()}
    assert names >= {"net-step00000002.safetensors", "net-step00000006.safetensors", "net-state"}
    assert "net-step00000004.safetensors" not in names and not any(name.endswith(".tmp") for name in names)
    weights = load_file(output / "net-step00000006.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())

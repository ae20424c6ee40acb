"""Optimizers with two sets of weights, and with rates of their own, in whole runs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import copy_log, log_of


def _equal(first, second):
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.e2e
def test_schedule_free_resumes_exactly_and_does_not_notice_saving_and_sampling(train, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle --w 64 --h 64 --s 2 --d 1\n")
    flags = ["--max_train_steps=7", "--network_train_unet_only", "--save_state"]
    flags += ["--optimizer_type=AdamWScheduleFree", "--optimizer_args", "warmup_steps=3"]
    look = ["--save_every_n_steps=4", f"--sample_prompts={prompts}", "--sample_every_n_steps=3"]
    whole = train("whole", *flags, *look)
    copy_log(whole, whole.parent / "resumed")
    state = whole / "net-step00000004-state"
    resumed = train("resumed", *flags, *look, f"--resume={state}")
    plain = train("plain", *flags)
    for other in (resumed, plain):
        assert _equal(whole / "net.safetensors", other / "net.safetensors")
        assert _equal(whole / "net-state" / "trained.safetensors", other / "net-state" / "trained.safetensors")
        assert log_of(whole) == log_of(other)
    assert len(list((whole / "sample").glob("*.png"))) == 2

    # The file holds the averages; the state the point at which training goes on.
    saved = load_file(whole / "net-step00000004.safetensors")
    trained = load_file(state / "trained.safetensors")
    ups = [value for name, value in saved.items() if name.endswith("lora_up.weight") and value.any()]
    points = [value for value in trained.values() if value.shape in {up.shape for up in ups}]
    assert ups and points and not any(torch.equal(up, y) for up in ups for y in points if up.shape == y.shape)
    assert torch.load(state / "optimizer.pt", weights_only=True)["param_groups"][0]["train_mode"]
    warm = [record["lr/warmup/unet"] for record in log_of(whole)]
    assert warm[:4] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])


@pytest.mark.e2e
def test_prodigy_logs_the_rate_that_it_found(train):
    flags = ["--max_train_steps=5", "--optimizer_type=Prodigy", "--learning_rate=1.0", "--lr_scheduler=rex"]
    out = train("out", *flags)
    records = [json.loads(line) for line in (out / "net-log.jsonl").read_text().splitlines()]
    assert records[0]["lr/unet"] == 1.0 and records[1]["lr/unet"] == pytest.approx(0.8 / 0.9)
    assert all(0 < record["lr/d*lr/unet"] < record["lr/unet"] for record in records)

"""Started as users start it: `accelerate launch` for one process, `torchrun` for two on a CPU."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from library.training.bands import NAMES
from tests.e2e.conftest import ROOT, arguments, log_of


def _start(launcher: list[str], argv: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(ROOT / "sdxl_train_network.py"), *argv],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, "what no user can do anything about is not shown"


@pytest.mark.e2e
def test_two_processes_equal_one_with_twice_the_batch(train, pictures, tmp_path):
    """Same samples, so same losses; gradients of two ranks are those of one big batch up to the order of sums."""
    flags = ["--max_train_steps=6", "--gradient_accumulation_steps=2", "--random_crop", "--shuffle_caption"]
    flags += ["--timestep_sequence=sobol", "--noise_offset=0.05", "--min_snr_gamma=5", "--dream_training"]
    flags += ["--validation_split=0.2", "--validate_every_n_steps=3", "--use_ema", "--ema_decay=0.5", "--save_ema=only"]
    one = train("one", *flags, "--train_batch_size=4")
    two = tmp_path / "two"
    launcher = ["torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    _start(launcher, arguments(pictures, two, *flags, "--train_batch_size=2"))
    for first, second in zip(log_of(one), log_of(two), strict=True):
        if "loss" not in first:
            assert {name: pytest.approx(value, abs=2e-3) for name, value in first.items()} == second
            continue
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=2e-3)
        bands, same_bands = ({key: record[key] for key in record if key in NAMES} for record in (first, second))
        assert bands == pytest.approx(same_bands, rel=1e-4)
    assert bands, "the last record has the means of all ranks' samples"
    expected, got = load_file(one / "net.safetensors"), load_file(two / "net.safetensors")
    difference = torch.stack([(expected[name] - got[name]).abs().max() for name in expected])
    size = max(float(tensor.abs().max()) for name, tensor in expected.items() if "lora_up" in name)
    assert size > 0.01 and float(difference.quantile(0.9)) < 0.02 * size


@pytest.mark.e2e
def test_accelerate_launch_runs_a_config_file(pictures, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        f"""
[model]
pretrained_model_name_or_path = "tiny"
[data]
train_data_dir = "{pictures.as_posix()}"
caption_extension = ".txt"
resolution = "64,64"
[network]
network_module = "networks.lora"
network_dim = 2
[run]
max_train_steps = 2
learning_rate = 1e-3
output_dir = "{(tmp_path / "out").as_posix()}"
output_name = "net"
"""
    )
    _start(["accelerate.commands.launch", "--num_cpu_threads_per_process=1"], [f"--config_file={config}"])
    assert (tmp_path / "out" / "net.safetensors").exists()
    assert [record["step"] for record in log_of(tmp_path / "out")] == [1, 2]

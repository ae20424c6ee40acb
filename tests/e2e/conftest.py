"""A few pictures and one way to start the real scripts in process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.training.metrics import MACHINE_KEYS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps the precision of a process's first run for ever; every test is a process of its own here."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A DreamBooth folder with pictures of three shapes and captions: 7 images, two of them wide, two tall."""
    folder = tmp_path / "train" / "2_thing"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, (w, h) in enumerate([(64, 64)] * 3 + [(96, 64)] * 2 + [(64, 96)] * 2):
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(folder / f"p{index}.png")
        (folder / f"p{index}.txt").write_text(f"a red circle, number {index}, plain")
    return folder.parent


def arguments(pictures: Path, output: Path, *flags: str) -> list[str]:
    """A small LoRA run on the tiny model as a command line."""
    network = ("--network_module=networks.lora", "--network_dim=4", "--learning_rate=1e-2")
    return full_arguments(pictures, output, *network, *flags)


def full_arguments(pictures: Path, output: Path, *flags: str) -> list[str]:
    """The same for any training script: without what is trained, and how fast."""
    return [
        "--pretrained_model_name_or_path=tiny",
        f"--train_data_dir={pictures}",
        "--caption_extension=.txt",
        "--resolution=64",
        "--enable_bucket",
        "--min_bucket_reso=32",
        "--max_bucket_reso=128",
        "--bucket_reso_steps=32",
        "--train_batch_size=2",
        "--max_data_loader_n_workers=0",
        "--seed=7",
        f"--output_dir={output}",
        "--output_name=net",
        *flags,
    ]


@pytest.fixture
def train(tmp_path, pictures):
    """train(output_name, *extra flags) runs sdxl_train_network.main and returns the output folder."""
    import sdxl_train_network

    def run(name: str, *flags: str) -> Path:
        output = tmp_path / name
        assert sdxl_train_network.main(arguments(pictures, output, *flags)) == 0
        return output

    return run


@pytest.fixture
def fine_tune(tmp_path, pictures):
    """fine_tune(output_name, *extra flags) runs sdxl_train.main and returns the output folder."""
    import sdxl_train

    def run(name: str, *flags: str) -> Path:
        output = tmp_path / name
        assert sdxl_train.main(full_arguments(pictures, output, "--learning_rate=1e-4", *flags)) == 0
        return output

    return run


def log_of(output: Path) -> list[dict]:
    """The records of a run without what depends on the machine."""
    lines = (output / "net-log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MACHINE_KEYS} for line in lines]


def copy_log(source: Path, target: Path) -> None:
    """Start `target` with the log of `source`, as a run does that goes on in the same folder."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "net-log.jsonl", target / "net-log.jsonl")

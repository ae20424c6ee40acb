"""A run that is interrupted and resumed equals the run that was not, to the bit."""

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import copy_log, log_of


def state_tensors(folder):
    """Everything that a state folder holds of weights, their averages and optimizer, by name."""
    tensors = load_file(folder / "trained.safetensors")
    if (folder / "ema.pt").exists():
        tensors |= _flat("ema", torch.load(folder / "ema.pt", weights_only=True))
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    for index, values in optimizer["state"].items():
        tensors |= _flat(f"{index}", values)
    return tensors


def _flat(name, value):
    if isinstance(value, dict):
        return {key: tensor for inner in value for key, tensor in _flat(f"{name}.{inner}", value[inner]).items()}
    return {} if value is None or isinstance(value, str) else {name: torch.as_tensor(value)}


@pytest.mark.e2e
@pytest.mark.parametrize(("workers", "accumulation", "steps", "first"), [(0, 1, 30, 13), (2, 3, 10, 4)])
def test_first_steps_and_resumed_rest_equal_all_steps(train, workers, accumulation, steps, first):
    flags = [
        f"--max_train_steps={steps}",
        f"--gradient_accumulation_steps={accumulation}",
        f"--max_data_loader_n_workers={workers}",
        *(["--persistent_data_loader_workers"] if workers else []),
        "--network_dropout=0.1",
        "--caption_dropout_rate=0.3",
        "--shuffle_caption",
        "--random_crop",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=5",
        "--save_state",
    ]
    whole = train("whole", *flags, f"--save_every_n_steps={first}")
    copy_log(whole, whole.parent / "resumed")
    resumed = train("resumed", *flags, f"--resume={whole / f'net-step{first:08d}-state'}")

    expected, got = state_tensors(whole / "net-state"), state_tensors(resumed / "net-state")
    assert expected.keys() == got.keys() and len(expected) > 1000
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    once, twice = load_file(whole / "net.safetensors"), load_file(resumed / "net.safetensors")
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert log_of(whole) == log_of(resumed)
    assert [record["step"] for record in log_of(resumed)] == list(range(1, steps + 1))


@pytest.mark.e2e
def test_resuming_inside_a_token_warm_up_is_exact(train, pictures):
    for path in pictures.rglob("*.txt"):
        path.write_text(f"{path.read_text()}\na {{green|blue}} circle; small, plain, on white, nothing else")
    flags = [
        "--max_train_steps=12",
        "--token_warmup_step=0.75",
        "--enable_wildcard",
        "--secondary_separator=;",
        "--shuffle_caption",
        "--save_state",
    ]
    whole = train("whole", *flags, "--save_every_n_steps=5")
    copy_log(whole, whole.parent / "resumed")
    state = whole / "net-step00000005-state"
    resumed = train("resumed", *flags, f"--resume={state}", "--max_data_loader_n_workers=2")
    first, second = load_file(whole / "net.safetensors"), load_file(resumed / "net.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert log_of(whole) == log_of(resumed)
    steady = train("steady", *flags, "--token_warmup_step=0")
    assert log_of(steady) != log_of(whole)


@pytest.mark.e2e
def test_the_number_of_workers_does_not_change_a_run(train):
    flags = ["--max_train_steps=6", "--random_crop", "--shuffle_caption", "--flip_aug"]
    one = log_of(train("w0", *flags))
    two = log_of(train("w2", *flags, "--max_data_loader_n_workers=2", "--persistent_data_loader_workers"))
    assert one == two


@pytest.mark.e2e
def test_gradient_checkpointing_does_not_change_a_run(train):
    flags = ["--max_train_steps=4"]
    plain, checkpointed = log_of(train("a", *flags)), log_of(train("b", *flags, "--gradient_checkpointing"))
    for one, other in zip(plain, checkpointed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.e2e
def test_a_finished_run_resumes_to_itself_and_the_state_brings_the_seed_and_the_rate(train, capfd):
    whole = train("out", "--max_train_steps=3", "--save_state", "--seed=11")
    before = load_file(whole / "net.safetensors")
    argv = ["--max_train_steps=3", "--learning_rate=1e-5", f"--resume={whole / 'net-state'}", "--save_state"]
    train("out", *argv)
    after = load_file(whole / "net.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    told = capfd.readouterr().err
    assert "run_seed differ" in told, "--seed=7 of the command line is not the state's 11"
    assert "the learning rates are the state's" in told

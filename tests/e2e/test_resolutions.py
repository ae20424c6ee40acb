"""The trainer at two resolutions: exact resume, two processes, and the length of a run in epochs."""

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import arguments, copy_log, log_of
from tests.ranks import two_ranks

FLAGS = ["--resolutions", "64", "96", "--resolution_weights", "1", "2", "--save_state"]


@pytest.fixture(autouse=True)
def only_several(monkeypatch):
    """The common arguments name one resolution."""
    import tests.e2e.conftest as common

    plain = arguments

    def without(*given):
        return [flag for flag in plain(*given) if not flag.startswith("--resolution=")]

    monkeypatch.setattr(common, "arguments", without)
    return without


@pytest.mark.e2e
def test_resume_in_the_middle_of_an_epoch_of_two_resolutions_is_exact(train):
    flags = [*FLAGS, "--max_train_epochs=2", "--shuffle_caption", "--token_warmup_step=0.75"]
    whole = train("whole", *flags, "--save_every_n_steps=12")
    copy_log(whole, whole.parent / "resumed")
    resumed = train("resumed", *flags, f"--resume={whole / 'net-step00000012-state'}")
    first, second = (load_file(out / "net.safetensors") for out in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert log_of(whole) == log_of(resumed)
    epochs = [record["epoch"] for record in log_of(whole)]
    assert set(epochs) == {1, 2} and epochs.index(2) not in (0, 12)


@pytest.mark.e2e
def test_two_processes_equal_one_at_two_resolutions(train, pictures, tmp_path, only_several):
    flags = [*FLAGS, "--max_train_steps=4", "--cache_latents"]
    one = train("one", *flags, "--train_batch_size=4")
    two = tmp_path / "two"
    two_ranks("sdxl_train_network", only_several(pictures, two, *flags, "--train_batch_size=2"), tmp_path)
    for first, second in zip(log_of(one), log_of(two), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


@pytest.mark.e2e
def test_a_cache_in_the_background_is_complete_after_an_epoch_and_resuming_stays_exact(train, pictures, capfd):
    flags = [*FLAGS, "--flip_aug", "--max_train_epochs=2", "--cache_latents_to_disk", "--validation_split=0.2"]
    background = [*flags, "--cache_in_background"]
    train("one_epoch", *background, "--max_train_epochs=1")
    said = capfd.readouterr().err
    assert "2 of held-out images to be cached now" in said and "the cache is complete, 14 entries, 0 failed" in said
    files = sorted(pictures.rglob("*_sdxl*.npz"))
    assert len(files) == 14
    whole = train("whole", *background, "--save_every_n_steps=4")
    before = train("before", *flags)
    assert "built 0, reused 14" in capfd.readouterr().err
    assert log_of(whole) == log_of(before)
    for path in files[::3]:
        path.unlink()
    copy_log(whole, whole.parent / "resumed")
    resumed = train("resumed", *background, f"--resume={whole / 'net-step00000004-state'}")
    assert log_of(whole) == log_of(resumed)
    first, second = (load_file(out / "net.safetensors") for out in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "the cache is complete, 14 entries, 0 failed" in capfd.readouterr().err

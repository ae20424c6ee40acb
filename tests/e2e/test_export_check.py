"""A run whose saved file is not its network ends as a failed one; a sound run is not changed by looking."""

import pytest

import sdxl_train_network
from library.training import saving
from library.training.export_check import ExportCheck
from networks import lora
from tests.e2e.conftest import arguments, log_of


@pytest.mark.e2e
def test_a_file_that_is_not_the_network_fails_the_run(pictures, tmp_path, monkeypatch, capfd):
    original = lora.create_from_weights

    def without_alpha(roots, tensors, **settings):
        return original(roots, {k: tensors[k] for k in tensors if not k.endswith("alpha")}, **settings)

    monkeypatch.setattr(lora, "create_from_weights", without_alpha)
    monkeypatch.setattr(saving.time, "sleep", lambda seconds: None)
    output = tmp_path / "out"
    code = sdxl_train_network.main(arguments(pictures, output, "--max_train_steps=1", "--save_precision=fp16"))
    assert code == 2
    assert "the saved network is not the trained one" in capfd.readouterr().err
    assert not (output / "net.safetensors").exists() and (output / "net.safetensors.differs").exists()


@pytest.mark.e2e
def test_looking_does_not_change_training(train, monkeypatch):
    flags = ["--max_train_steps=3", "--save_every_n_steps=1", "--use_ema", "--save_precision=bf16"]
    looked = train("looked", *flags)
    monkeypatch.setattr(ExportCheck, "__call__", lambda self, path, *, is_last: None)
    assert log_of(looked) == log_of(train("blind", *flags))

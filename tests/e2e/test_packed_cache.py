"""Training from a packed cache with the real scripts on the tiny model."""

import pytest

from tests.data.test_cache_tools import tool
from tests.e2e.conftest import arguments, log_of

CACHED = (
    "--network_train_unet_only",
    "--cache_latents_to_disk",
    "--cache_text_encoder_outputs_to_disk",
    "--flip_aug",
    "--caption_dropout_rate=0.3",
    "--max_train_steps=4",
)
PACKED = (*CACHED, "--cache_store=packed")


@pytest.mark.e2e
def test_training_from_a_packed_cache_builds_it_once_and_equals_training_from_npz(train, pictures, capfd):
    first = train("first", *PACKED)
    assert "latents: built 7, reused 0" in capfd.readouterr().err
    again = train("again", *PACKED)
    told = capfd.readouterr().err
    assert "latents: built 0, reused 7" in told and "text encoder outputs: built 0, reused 7" in told
    losses = [record["loss"] for record in log_of(first)]
    assert [record["loss"] for record in log_of(again)] == losses
    assert not list(pictures.rglob("*.npz")) and (pictures / ".sdxl_cache" / "text").is_dir()
    npz = train("npz", *CACHED)
    # Entries are float16; the rest is the same, draw for draw.
    assert [record["loss"] for record in log_of(npz)] == pytest.approx(losses, rel=5e-3)


@pytest.mark.e2e
def test_training_builds_nothing_after_the_cache_tools(train, pictures, tmp_path, capfd):
    folder = tmp_path / "cache"
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        assert tool(name).main(arguments(pictures, tmp_path / "x", *PACKED, f"--cache_dir={folder}")) == 0
    capfd.readouterr()
    train("out", *PACKED, f"--cache_dir={folder}")
    told = capfd.readouterr().err
    assert "latents: built 0, reused 7" in told and "text encoder outputs: built 0, reused 7" in told
    assert not (pictures / ".sdxl_cache").exists() and not list(pictures.rglob(".sdxl_*"))

"""--cache_in_background through the real script."""

import pytest

from tests.e2e.conftest import log_of


@pytest.mark.e2e
def test_training_while_the_cache_is_built_equals_training_from_a_cache_made_before(train, pictures, capfd):
    flags = ["--max_train_epochs=1", "--flip_aug", "--max_data_loader_n_workers=2", "--cache_latents_to_disk"]
    filled = log_of(train("filled", *flags, "--cache_in_background", "--vae_batch_size=2"))
    assert "the cache is complete" in capfd.readouterr().err
    assert len(list(pictures.rglob("*_sdxl.npz"))) == 7
    stamps = {path: path.stat().st_mtime_ns for path in pictures.rglob("*_sdxl.npz")}
    made_before = log_of(train("before", *flags))
    assert "built 0, reused 7" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    for one, other in zip(filled, made_before, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.e2e
def test_with_cached_moments_training_equals_training_without_a_cache(train):
    flags = ["--max_train_steps=3", "--flip_aug"]
    plain = log_of(train("plain", *flags))
    cached = log_of(train("cached", *flags, "--cache_latents", "--cache_latents_moments"))
    for one, other in zip(plain, cached, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)

"""Cached moments: every epoch draws its own latents, the very ones of a run without a cache."""

import numpy as np
import pytest
import torch

from library.config.cli import make_config
from library.data.assemble import assemble
from library.data.dataset import build_train_data
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.diffusion.posterior import sample_posterior
from library.errors import UserError
from library.inference.encode_pass import latent_encoder
from library.models import checkpoint
from library.models.families import sdxl
from library.training.draws import Draws
from tests.data.fakes import Counting
from tests.data.specs import dataset, subset, write_folder

NUM = 7


def fake_moments(pixels_B3HW, noise_B4hw):
    """Mean and log-variance that tell images and mirror images apart."""
    cells = torch.nn.functional.avg_pool2d(pixels_B3HW, 8)[:, [0, 1, 2, 0]]
    return torch.cat([cells, cells - 1], dim=1), torch.ones(len(cells), dtype=torch.bool)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "1_pictures")


def table_of(folder, **changes):
    return assemble([dataset(subset(folder, **changes))])[0]


def build(table, encode=None, **options):
    defaults = {"vae_id": "vae", "to_disk": True, "batch_size": 2, "moments": True}
    options = LatentCacheOptions(**(defaults | options))
    return build_latents(table, encode or Counting(fake_moments), options=options)


@pytest.mark.parametrize("to_disk", [False, True])
def test_moments_are_kept_for_the_image_and_its_mirror_image(folder, to_disk):
    table = table_of(folder, flip_aug=True)
    store, _ = build(table, to_disk=to_disk)
    for row in range(NUM):
        plain, mirrored = (store.get(row, flipped=flip) for flip in (False, True))
        assert plain.moments_8hw.shape == (8, *plain.latents_4hw.shape[1:])
        assert torch.allclose(plain.moments_8hw.flip(-1), mirrored.moments_8hw, atol=1e-6)
        assert not torch.equal(plain.moments_8hw, mirrored.moments_8hw)


def test_the_file_also_holds_latents_for_sd_scripts(folder):
    build(table_of(folder, flip_aug=True))
    with np.load(next(folder.glob("p0*.npz")), allow_pickle=False) as file:
        assert file["moments"].dtype == file["moments_flipped"].dtype == np.float32
        assert file["moments"].shape == (8, *file["latents"].shape[1:]) == file["moments_flipped"].shape
        deviation = (file["latents"] - file["moments"][:4]) / np.exp(0.5 * file["moments"][4:])
        assert 0.5 < deviation.std() < 1.5


def test_entries_without_moments_are_built_again_when_they_are_wanted_and_only_then(folder):
    build(table_of(folder), Counting(), moments=False)
    _, report = build(table_of(folder))
    assert {stale.reason for stale in report.stale} == {"no mean and variance"} and report.built == NUM
    assert build(table_of(folder))[1].reused == NUM
    store, report = build(table_of(folder), Counting(), moments=False)
    assert report.reused == NUM and store.get(0, flipped=False).moments_8hw is None
    _, report = build(table_of(folder, flip_aug=True))
    assert report.built == NUM


def test_moments_beside_latents_that_another_program_has_rewritten_are_not_trusted(folder):
    build(table_of(folder))
    (folder / ".sdxl_latents_index").unlink()
    victim = next(folder.glob("p3*.npz"))
    with np.load(victim) as file:
        arrays = {**file, "latents": file["latents"] + 1}
    np.savez(victim, **arrays)
    _, report = build(table_of(folder))
    assert [stale.reason for stale in report.stale] == ["latents of another program"] and report.built == 1


def test_rebuilding_without_moments_removes_the_old_ones(folder):
    build(table_of(folder))
    build(table_of(folder), Counting(), moments=False, vae_id="other")
    with np.load(next(folder.glob("p0*.npz")), allow_pickle=False) as file:
        assert "moments" not in file


@pytest.mark.parametrize("to_disk", [False, True])
def test_with_moments_every_epoch_equals_training_without_a_cache(folder, to_disk):
    vae = checkpoint.load_bundle("tiny", parts=("vae",)).vae
    specs = [dataset(subset(folder, flip_aug=True), batch_size=2)]
    cached, uncached = (build_train_data(specs, seed=3) for _ in range(2))
    encoder = latent_encoder(vae, device="cpu", moments=True)
    cached.attach_latents(build(cached.table, lambda: encoder, to_disk=to_disk)[0])
    draws, seen = Draws(3), {}
    for epoch in range(2):
        groups = zip(cached.epoch(epoch), uncached.epoch(epoch), strict=True)
        for left, right in ((a.micro_batches[0], b.micro_batches[0]) for a, b in groups):
            assert left.keys == right.keys and left.pixels_B3HW is None and left.latents_B4hw is None
            shape = (4, left.bucket.h // 8, left.bucket.w // 8)
            noise = draws.make(left.keys, epoch, latent_shape=shape, posterior=True).posterior_BChw
            with torch.no_grad():
                fresh = sdxl.encode_image(vae, right.pixels_B3HW, noise)
            drawn = sample_posterior(left.moments_B8hw, noise)
            assert torch.allclose(drawn, fresh, atol=1e-4)
            for key, row in zip(left.keys, drawn, strict=True):
                seen.setdefault(key, []).append(row)
    assert all(not torch.equal(*rows) for rows in seen.values()), "an epoch drew the latents of another"


@pytest.mark.parametrize("name", ["cache_latents_moments", "cache_in_background"])
def test_options_about_the_cache_need_one(tmp_path, name):
    (tmp_path / "1_x").mkdir()
    settings = {"pretrained_model_name_or_path": "tiny", "train_data_dir": str(tmp_path), "resolution": 64}
    settings |= {"output_dir": str(tmp_path), "network_module": "networks.lora"}
    with pytest.raises(UserError, match=f"{name} needs cache_latents"):
        make_config("sdxl_train_network", **settings, **{name: True})
    make_config("sdxl_train_network", **settings, **{name: True, "cache_latents_to_disk": True})

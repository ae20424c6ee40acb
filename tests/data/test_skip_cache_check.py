"""--skip_cache_check trusts what files were made from, not that they hold what the run needs."""

import pytest

from library.data.dataset import build_train_data
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.sizes import Size
from tests.data.fakes import Counting, fake_vae
from tests.data.specs import dataset, subset, write_folder, write_picture
from tests.data.test_latent_moments import fake_moments


def cached(folder, *, vae="vae", moments=False, sides=(64,), **changes):
    first, *others = (Size(side, side) for side in sides)
    spec = dataset(subset(folder, **changes), resolution=first, other_resolutions=tuple(others))
    data = build_train_data([spec], seed=5)
    options = LatentCacheOptions(vae, to_disk=True, batch_size=2, skip_check=True, moments=moments)
    encode = Counting(fake_moments if moments else fake_vae)
    store, report = build_latents(data.all_images, encode, options=options)
    data.attach_latents(store)
    return [batch for group in data.epoch(0) for batch in group.micro_batches], report


def test_a_file_with_latents_alone_is_trusted(tmp_path):
    cached(write_folder(tmp_path / "pictures"))
    _, report = cached(tmp_path / "pictures", vae="another")
    assert (report.built, report.reused) == (0, 7)


@pytest.mark.parametrize("changes", [{"flip_aug": True}, {"alpha_mask": True}, {"moments": True}])
def test_a_file_that_lacks_something_is_built_again(tmp_path, changes):
    cached(write_folder(tmp_path / "pictures"))
    batches, report = cached(tmp_path / "pictures", **changes)
    assert report.built == 7 and not any(batch.failures for batch in batches)
    _, report = cached(tmp_path / "pictures", vae="another", **changes)
    assert report.reused == 7


def test_files_of_several_resolutions_are_told_apart(tmp_path):
    cached(write_folder(tmp_path / "pictures"), sides=(96,))
    batches, report = cached(tmp_path / "pictures", sides=(64, 96))
    assert (report.built, report.reused) == (7, 7)
    assert all(batch.latents_B4hw.shape[-2:] == (batch.bucket.h // 8, batch.bucket.w // 8) for batch in batches)


def test_latents_of_another_bucket_are_never_trained_on(tmp_path):
    write_picture(tmp_path / "pictures/p.png", 64, 64)
    cached(tmp_path / "pictures", sides=(96,))
    (batch,), _ = cached(tmp_path / "pictures")
    assert batch.num_real == 0 and "skip_cache_check" in batch.failures[0].reason

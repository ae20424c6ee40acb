"""The caching pass as a pipeline: decoded ahead, stored behind, scaled JPEG decoding, and what stops it."""

import errno
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data import latent_backends, latent_caching, transforms
from library.data.assemble import assemble
from library.data.background import num_helpers
from library.data.dataset import build_train_data
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.data.records import ImageRecord
from library.data.transforms import decode_scale, read_record
from library.errors import UserError
from library.io import latent_cache
from library.io.images import read_image, read_picture, scaled_side
from library.sizes import Size
from tests.data.fakes import Counting, fake_vae
from tests.data.specs import dataset, subset, write_folder, write_picture

NUM = 7


def table_of(folder, **changes):
    return assemble([dataset(subset(folder), **changes)])[0]


def build(table, encode=None, **options):
    options = LatentCacheOptions("vae", **({"to_disk": True, "batch_size": 2} | options))
    return build_latents(table, encode or Counting(), options=options)


def photo(path, width, height, *, exif=None, sigma=4.0):
    """A JPEG with soft shapes and sensor noise."""
    rng = np.random.default_rng(width + height)
    image = np.zeros((height, width, 3))
    for cells, strength in ((4, 60), (16, 30), (64, 15)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += (np.asarray(coarse.resize((width, height), Image.BICUBIC)) / 127.5 - 1) * strength
    image += rng.normal(0, sigma, image.shape) + 128
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = {} if exif is None else {"exif": exif}
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=92, **extra)
    return path


def test_a_full_disk_stops_the_pass_with_its_sentence_and_keeps_what_is_whole(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "pictures")
    written = []
    real = latent_cache.write

    def write(path, entry, fingerprint):
        if len(written) == 3:
            raise UserError("no space left on the disk while writing", where=str(path)) from OSError(errno.ENOSPC, "")
        real(path, entry, fingerprint)
        written.append(path)

    monkeypatch.setattr(latent_cache, "write", write)
    encode = Counting()
    with pytest.raises(UserError, match="no space left"):
        build(table_of(folder), encode, batch_size=1)
    assert len(list(folder.glob("*.npz"))) == 3 and not list(folder.glob(".*.tmp"))
    assert not [thread for thread in threading.enumerate() if thread.name in ("ahead", "behind")]
    monkeypatch.setattr(latent_cache, "write", real)
    rest = Counting()
    build(table_of(folder), rest)
    assert rest.images == NUM - 3


def test_only_so_many_images_are_decoded_ahead_of_a_slow_encoder(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    for number in range(40):
        write_picture(folder / f"p{number:02}.png", 64, 64, caption="x", seed=number)
    decoded, lead = [], []
    real = latent_caching.read_pictures

    def read(record, placement, **options):
        decoded.append(record.key)
        return real(record, placement, **options)

    def slow(pixels, noise):
        threading.Event().wait(0.03)
        lead.append(len(decoded) - sum(map(len, encoded)))
        encoded.append(pixels)
        return fake_vae(pixels, noise)

    encoded = []
    monkeypatch.setattr(latent_caching, "read_pictures", read)
    build(table_of(folder), Counting(slow), to_disk=False)
    batch = 2
    # Being encoded, ready, just made, and the images that the helpers were given.
    assert max(lead) <= 3 * batch + 2 * num_helpers() + batch
    assert max(lead) > batch, "nothing was decoded ahead"


def record(name, size, *, interpolation=None):
    return ImageRecord(name, f"/x/{name}", size, "", subset("/x", resize_interpolation=interpolation))


@given(st.integers(32, 9000), st.integers(32, 9000), st.integers(32, 1100), st.integers(32, 1100))
def test_a_decode_is_smaller_when_both_sides_shrink_by_more_than_two_and_leaves_enough_pixels(w, h, rw, rh):
    scale = decode_scale(record("a.JPG", Size(w, h)), Size(rw, rh))
    assert scale in (1, 2, 4, 8)
    shrink = min(w / rw, h / rh)
    assert (scale > 1) == (shrink > 2)
    assert scale < 4 or shrink / scale >= 2
    assert scale in (1, 8) or shrink < 4 * scale or (w % (2 * scale) or h % (2 * scale))
    for side, resized in ((w, rw), (h, rh)):
        assert scaled_side(side, scale) >= resized or scale == 1
        # How far the last pixel of the resized image is from where the whole image would have had it.
        assert abs(scaled_side(side, scale) * scale / side - 1) * resized <= (0.5 if scale == 2 else 0.125)


@pytest.mark.parametrize(
    ("size", "resized", "scale"),
    [
        ((2048, 2048), (1024, 1024), 1),  # as far as 2, not beyond it
        ((2049, 2049), (1024, 1024), 2),
        ((4000, 2048), (1024, 1024), 1),  # both sides
        ((2150, 2150), (1024, 1024), 2),
        ((4088, 4088), (1024, 1024), 2),
        ((4096, 4096), (1024, 1024), 2),  # at 1/4 one decoded pixel would be left for one
        ((8192, 8192), (1024, 1024), 4),
        ((8194, 8194), (1024, 1024), 2),  # at 1/4 the far edge would move by a quarter of a pixel
        ((16384, 16384), (1024, 1024), 8),
    ],
)
def test_the_scale_of_a_decode(size, resized, scale):
    assert decode_scale(record("a.jpg", Size(*size)), Size(*resized)) == scale


def test_only_jpegs_under_the_area_filter_are_decoded_smaller():
    small = Size(64, 64)
    size = Size(512, 512)
    assert decode_scale(record("a.jpg", size), small) == decode_scale(
        record("a.jpeg", size, interpolation="area"), small
    )
    assert decode_scale(record("a.jpg", size), small) == 4
    assert decode_scale(record("a.png", size), small) == 1
    assert decode_scale(record("a.jpg", size, interpolation="lanczos"), small) == 1


@pytest.mark.parametrize(("width", "height"), [(1024, 768), (2005, 1203), (1999, 2003)])
def test_a_scaled_decode_is_near_the_whole_one(tmp_path, width, height):
    path = photo(tmp_path / "a.jpg", width, height)
    for divide in (2.1, 3, 4.1, 9, 17):
        target = Size(int(width / divide), int(height / divide))
        what = ImageRecord("a", str(path), Size(width, height), "", subset(tmp_path))
        assert decode_scale(what, target) > 1
        near = transforms.resize(read_record(what, target), target).astype(float)
        whole = transforms.resize(read_image(path), target).astype(float)
        assert np.abs(near - whole).mean() < 1.0
        assert abs((near - whole).mean()) < 0.3


def test_a_scaled_picture_keeps_its_orientation_and_tells_its_whole_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = photo(tmp_path / "a.jpg", 401, 250, exif=exif)
    whole, half = read_picture(path), read_picture(path, scale=2)
    assert whole.size == half.size == Size(250, 401)
    assert whole.pixels.shape == (401, 250, 3) and half.pixels.shape == (200, 125, 3)
    again = transforms.resize(whole.pixels, Size(125, 200)).astype(float)
    assert np.abs(again - half.pixels).mean() < 4


def test_other_kinds_of_pictures_come_whole(tmp_path):
    write_picture(tmp_path / "a.png", 64, 48)
    assert read_picture(tmp_path / "a.png", scale=4).pixels.shape == (48, 64, 3)


def test_a_scaled_jpeg_is_trained_on_alike_from_the_cache_and_without(tmp_path):
    photo(tmp_path / "1_x" / "a.jpg", 640, 480).with_suffix(".txt").write_text("x")
    specs = [dataset(subset(tmp_path / "1_x"), batch_size=1)]
    table = assemble(specs)[0]
    assert decode_scale(table[0].record, table[0].placement.resized) > 1
    seen = []
    build(table, Counting(lambda pixels, noise: (seen.append(pixels), fake_vae(pixels, noise))[1]), to_disk=False)
    uncached = next(iter(build_train_data(specs, seed=1).epoch(0))).micro_batches[0]
    assert torch.equal(uncached.pixels_B3HW, seen[0])
    assert uncached.sizes_B6[0, :2].tolist() == [480, 640]


def test_entries_from_whole_decodes_stay_valid_and_those_of_shrunk_jpegs_are_built_again(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    photo(folder / "large.jpg", 640, 480)
    photo(folder / "small.jpg", 100, 90)
    write_picture(folder / "large.png", 600, 480)
    with monkeypatch.context() as before:  # as before there was scaled decoding
        for module in (transforms, latent_backends):
            before.setattr(module, "decode_scale", lambda record, resized: 1)
        build(table_of(folder))
    _, report = build(table_of(folder))
    assert [stale.reason for stale in report.stale] == ["JPEG decoding changed"]
    assert "large_0640" in report.stale[0].path and report.reused == 2

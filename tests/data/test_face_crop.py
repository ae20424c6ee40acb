"""Crops that follow the face that an image's name tells of."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from library.config.spans import Span
from library.data.assemble import assemble
from library.data.buckets import Placement
from library.data.dataset import build_train_data
from library.data.face_crop import Face, draw_window, face_in_name, scale_bounds
from library.data.inspection import InspectionSettings, inspect
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.data.pixels import to_pixels
from library.data.records import ImageRecord, PlacedImage
from library.data.report_files import report_text
from library.data.sample_draws import Visit, draw_sample
from library.data.transforms import apply_crop, read_record
from library.diffusion.crops import size_ids
from library.diffusion.masks import mask_cells
from library.sizes import Size
from tests.data.specs import dataset, subset, write_picture

SPAN = Span(2.0, 4.0)
IMAGE, FACE, CROP = Size(640, 480), Face(480, 300, 48, 60), Size(64, 64)
SIDES = st.integers(32, 2000)


def window(face=FACE, image=IMAGE, target=CROP, *, span=SPAN, is_random=False, seed=0):
    return draw_window(face, image, target, span=span, is_random=is_random, rng=random.Random(seed))


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("cat_480_300_48_60.png", FACE),
        ("/data/9_9_9_9/a_b_480_300_48_60.tar.jpg", None),  # the stem ends in .tar
        ("/data/9_9_9_9/a_b_480_300_48_60.jpg", FACE),
        ("_480_300_48_60.png", FACE),
        ("480_300_48_60.png", None),  # four pieces
        ("cat_480_300_48.png", None),
        ("cat_480_300_48_6x.png", None),
        ("cat_480_300_48_-60.png", None),
        ("cat_480_300_48_6.0.png", None),
        ("cat_480_300_48_.png", None),
        ("cat_480_300_48_60_.png", None),
        ("cat_480_300_0_60.png", None),
        ("cat_640_300_48_60.png", None),  # outside
        ("cat_480_480_48_60.png", None),
        ("cat_0_300_48_60.png", None),
        ("cat_480_300_48_99999999999999999999.png", None),
        ("cat.png", None),
        ("", None),
    ],
)
def test_a_face_stands_in_the_last_four_pieces_of_the_stem(name, face):
    assert face_in_name(name, IMAGE) == face


# --- the window -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("face", "image", "target", "span", "bounds"),
    [
        # 64 / (40 * 4) and 64 / (40 * 2)
        (Face(300, 200, 40, 30), Size(640, 480), Size(64, 64), SPAN, (0.4, 0.8)),
        (Face(300, 200, 30, 40), Size(640, 480), Size(64, 64), SPAN, (0.4, 0.8)),  # the longer side of the face
        (Face(300, 200, 40, 30), Size(640, 480), Size(96, 64), SPAN, (0.4, 0.8)),  # the shorter one of the crop
        (Face(300, 200, 10, 10), Size(640, 480), Size(64, 64), SPAN, (1.0, 1.0)),  # never enlarged for a face
        (Face(300, 200, 20, 20), Size(640, 480), Size(64, 64), SPAN, (0.8, 1.0)),
        (Face(300, 200, 400, 400), Size(640, 480), Size(64, 64), SPAN, (64 / 480, 64 / 480)),  # covers the crop
        (Face(300, 200, 80, 80), Size(640, 480), Size(64, 128), SPAN, (128 / 480, 0.4)),  # on both sides
        (Face(20, 20, 8, 8), Size(48, 40), Size(64, 64), SPAN, (1.6, 1.6)),  # too small an image
    ],
)
def test_the_scale_makes_the_crop_a_multiple_of_the_face(face, image, target, span, bounds):
    assert scale_bounds(face, image, target, span=span) == pytest.approx(bounds)


def test_scales_are_drawn_evenly():
    scales = [window(Face(300, 200, 40, 30), seed=seed).resized.w / 640 for seed in range(400)]
    counts, _ = np.histogram(scales, bins=4, range=(0.4, 0.8))
    assert counts.sum() == 400 and min(counts) > 70


def test_a_span_of_one_number_leaves_nothing_to_chance():
    windows = {window(Face(300, 200, 64, 30), span=Span(2, 2), seed=seed) for seed in range(20)}
    # at half its size the face has its centre at (150, 100)
    assert windows == {(Size(320, 240), 100 - 32, 150 - 32)}


def test_the_centre_moves_by_up_to_a_twentieth_of_the_face():
    """The scale is that at which the image covers the crop's height, so that only the place is drawn."""
    face, image, target = Face(1000, 500, 600, 700), Size(2000, 960), Size(320, 320)
    middle = int(1000 / 3 + 0.5) - 160
    lefts = {window(face, image, target, seed=seed).left - middle for seed in range(400)}
    assert lefts == set(range(-35, 36))
    small = {window(Face(1000, 500, 39, 39), image, target, span=Span(0.5, 1), seed=seed).left for seed in range(50)}
    assert small == {1000 - 160}, "faces below 40 pixels are centred"


def test_random_crops_reach_every_place_and_most_of_them_hold_the_face():
    face, image, target = Face(1400, 500, 600, 700), Size(2000, 960), Size(320, 320)
    centre, length = int(1400 / 3 + 0.5), int(2000 / 3 + 0.5)
    lefts = np.array([window(face, image, target, is_random=True, seed=seed).left for seed in range(4000)])
    assert {lefts.min(), lefts.max()} == {0, length - 320}
    holds = (lefts <= centre) & (centre < lefts + 320)
    assert 0.55 < holds.mean() < 1.0
    # The sum of two even draws over the distance to the farther edge, clamped: what P(left = largest) has to be.
    reach, gap = centre, length - 320 - (centre - 160)
    steps = np.add.outer(np.arange(reach + 1), np.arange(reach + 1)) - reach
    assert (lefts == length - 320).mean() == pytest.approx((steps >= gap).mean(), abs=0.03)


@given(SIDES, SIDES, st.tuples(st.integers(1, 8), st.integers(1, 8)), st.data(), st.booleans(), st.integers(0, 99))
def test_the_window_lies_inside_and_holds_the_centre_of_the_face(w, h, cells, data, is_random, seed):
    image, target = Size(w, h), Size(32 * cells[0], 32 * cells[1])
    face = Face(*(data.draw(st.integers(*ends)) for ends in ((1, w - 1), (1, h - 1), (1, w), (1, h))))
    low = data.draw(st.floats(0.1, 8))
    span = Span(low, low + data.draw(st.sampled_from([0, 0.5, 5])))
    found = window(face, image, target, span=span, is_random=is_random, seed=seed)
    assert 0 <= found.top <= found.resized.h - target.h and 0 <= found.left <= found.resized.w - target.w
    scale = found.resized.h / h
    smallest, largest = scale_bounds(face, image, target, span=span)
    assert smallest - 1 / h <= scale <= largest + 1 / h
    assert abs(found.resized.w / w - scale) <= 0.5 / w + 0.5 / h + 1e-9, "the aspect is kept"
    assume(not is_random and max(face.w, face.h) / 20 < min(target) / 2 - 2)
    assert found.left <= face.cx * scale + 1 and face.cx * scale - 1 <= found.left + target.w
    assert found.top <= face.cy * scale + 1 and face.cy * scale - 1 <= found.top + target.h


def test_draws_stay_what_they_are():
    """A seed gives the crops that it gave before; a change of these numbers changes everybody's training."""
    record = ImageRecord("a/x", "/a/x_480_300_48_60.png", IMAGE, "", subset(face_crop_aug_range=SPAN, flip_aug=True))
    placed = PlacedImage(record, Placement(Size(64, 64), Size(85, 64), 0.0), 0)
    drawn = [draw_sample(placed, Visit(epoch), seed=7).crop for epoch in range(3)]
    assert [(crop.resized, crop.top, crop.left, crop.flipped) for crop in drawn] == GOLDEN
    assert [crop.original for crop in drawn] == [IMAGE] * 3
    cached = draw_sample(placed, Visit(0), seed=7, is_cached=True).crop
    assert (cached.resized, cached.top, cached.left) == (Size(85, 64), 0, 10)


GOLDEN = [((307, 230), 113, 199, False), ((201, 151), 59, 116, False), ((228, 171), 74, 141, False)]


# --- the whole way --------------------------------------------------------------------------------------------------


def write_face(folder: Path, name: str, *, size=IMAGE, face=FACE, suffix=".png") -> Path:
    """A picture with x in red, y in green (as shares of the sides) and a blue rectangle where the face is."""
    y, x = np.mgrid[: size.h, : size.w]
    pixels = np.stack([x * 255 // size.w, y * 255 // size.h, np.zeros_like(x)], axis=-1).astype(np.uint8)
    left, top = face.cx - face.w // 2, face.cy - face.h // 2
    pixels[top : top + face.h, left : left + face.w, 2] = 255
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{face.cx}_{face.cy}_{face.w}_{face.h}{suffix}"
    Image.fromarray(pixels).save(path, quality=95)
    return path


def no_buckets(*subsets, **changes):
    return dataset(*subsets, **({"enable_bucket": False, "batch_size": 2} | changes))


def batches(*specs, epochs=3, seed=3):
    data = build_train_data(list(specs), seed=seed)
    return [batch for epoch in range(epochs) for group in data.epoch(epoch) for batch in group.micro_batches]


def rows(found):
    return [(batch, row) for batch in found for row in range(batch.num_real)]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_batches_show_the_face_at_the_size_that_was_asked_for(tmp_path, suffix):
    (tmp_path / "faces").mkdir()
    for name in "abc":
        write_face(tmp_path / "faces", name, suffix=suffix)
    spec = no_buckets(subset(tmp_path / "faces", face_crop_aug_range=SPAN, flip_aug=True, num_repeats=2))
    scales, seen = set(), rows(batches(spec, epochs=4))
    assert len(seen) == 24
    for batch, row in seen:
        assert batch.pixels_B3HW.shape[-2:] == (64, 64)
        _, _, blue_HW = ((batch.pixels_B3HW[row] + 1) / 2).unbind()
        area = float(blue_HW.sum())
        scale = (area / (FACE.w * FACE.h)) ** 0.5
        assert 64 / (60 * 4) * 0.93 < scale < 64 / (60 * 2) * 1.07
        scales.add(round(scale, 2))
        y, x = (blue_HW > 0.5).nonzero().float().mean(0).tolist()
        assert abs(x - 31.5) < 5 and abs(y - 31.5) < 5
    assert len(scales) > 5


def test_a_jpeg_is_decoded_for_the_size_that_was_drawn(tmp_path):
    """The usual crop of this image shrinks it by 12; what is cut out around the face shrinks less and keeps detail."""
    face, image = Face(500, 400, 20, 16), Size(960, 768)
    path = tmp_path / "faces" / "a_500_400_20_16.jpg"
    path.parent.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (image.h, image.w, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    spec = no_buckets(subset(path.parent, face_crop_aug_range=Span(5, 9), num_repeats=4), batch_size=1)
    record = assemble([spec])[0].record(0)
    for batch in batches(spec, epochs=1):
        repeat = batch.keys[0].repeat
        crop = draw_sample(assemble([spec])[0][0], Visit(0, repeat), seed=3).crop
        assert crop.resized.w > image.w / 3 and face_in_name(str(path), image) == face
        expected = to_pixels(apply_crop(read_record(record, crop.resized), crop))
        assert torch.equal(batch.pixels_B3HW[0], expected)


def test_size_ids_are_those_of_the_crop_that_was_made(tmp_path):
    """Where the window starts is read off the picture, whose colours are coordinates."""
    write_face(tmp_path / "faces", "a")
    spec = no_buckets(subset(tmp_path / "faces", face_crop_aug_range=SPAN, flip_aug=True, num_repeats=8))
    mirrored = set()
    for batch, row in rows(batches(spec)):
        height, width, top, left, *target = batch.sizes_B6[row].tolist()
        assert (height, width, *target) == (480, 640, 64, 64)
        red_HW, green_HW, _ = (batch.pixels_B3HW[row] + 1) * 127.5
        mirrored.add(is_flipped := bool(red_HW[0, 0] > red_HW[0, -1]))
        # red per pixel of the crop tells the scale
        scale = (255 / 640) / (abs(float(red_HW[0, -1] - red_HW[0, 0])) / 63)
        assert float(green_HW[0, 0]) * 480 / 255 * scale == pytest.approx(top, abs=3)
        first = float(red_HW[0, 0]) * 640 / 255 * scale
        assert (640 * scale - first if is_flipped else first) == pytest.approx(left, abs=5)
    assert mirrored == {True, False}


@pytest.mark.parametrize("changes", [{}, {"flip_aug": True}, {"flip_aug": True, "random_crop": True}])
def test_masks_and_condition_images_are_cut_in_the_same_window(tmp_path, changes):
    for kind in ("faces", "masks", "controls"):
        write_face(tmp_path / kind, "a")
        write_face(tmp_path / kind, "b", size=Size(500, 700), face=Face(200, 400, 90, 80))
    common = {"face_crop_aug_range": SPAN, "num_repeats": 6, "resize_interpolation": "area", **changes}
    spec = no_buckets(
        subset(tmp_path / "faces", mask_dir=str(tmp_path / "masks"), control_dir=str(tmp_path / "controls"), **common)
    )
    seen = batches(spec)
    assert len(rows(seen)) == 36
    for batch in seen:
        assert torch.equal(batch.pixels_B3HW, batch.control_B3HW)
        red_BHW = torch.round((batch.pixels_B3HW[:, 0] + 1) * 127.5) / 255
        assert torch.equal(batch.mask_B1hw, torch.stack([mask_cells(red_HW)[None] for red_HW in red_BHW]))


def test_transparency_is_cut_in_the_same_window(tmp_path):
    path = write_face(tmp_path / "faces", "a")
    with Image.open(path) as image:
        image.putalpha(image.getchannel("R"))
        image.save(path)
    common = {"face_crop_aug_range": SPAN, "num_repeats": 4, "resize_interpolation": "area", "flip_aug": True}
    for batch in batches(no_buckets(subset(tmp_path / "faces", alpha_mask=True, **common))):
        red_BHW = torch.round((batch.pixels_B3HW[:, 0] + 1) * 127.5) / 255
        assert torch.equal(batch.mask_B1hw, torch.stack([mask_cells(red_HW)[None] for red_HW in red_BHW]))


def test_images_without_a_face_in_their_names_are_cropped_as_usual_and_counted(tmp_path):
    write_face(tmp_path / "faces", "a")
    write_picture(tmp_path / "faces" / "plain.png", 160, 96)
    write_picture(tmp_path / "others" / "other.png", 160, 96)
    spec = no_buckets(subset(tmp_path / "faces", face_crop_aug_range=SPAN), subset(tmp_path / "others"))
    usual = no_buckets(subset(tmp_path / "faces"), subset(tmp_path / "others"))
    crops = {record: set(found) for record, found in _ids(spec).items()}
    before = {record: set(found) for record, found in _ids(usual).items()}
    assert len(crops["faces/a_480_300_48_60.png"]) > 1
    for same in ("faces/plain.png", "others/other.png"):
        assert crops[same] == before[same] and len(crops[same]) == 1
    text = build_train_data([spec], seed=1).summary().text()
    assert "1 images have no face in their names (_cx_cy_w_h): face_crop_aug_range leaves them alone" in text
    assert "_cx_cy_w_h" not in build_train_data([no_buckets(subset(tmp_path / "others"))], seed=1).summary().text()


def _ids(spec):
    found = {}
    for batch, row in rows(batches(spec)):
        found.setdefault(batch.keys[row].record, []).append(tuple(batch.sizes_B6[row].tolist()))
    return found


def test_validation_images_are_not_followed(tmp_path):
    for name in "abcd":
        write_face(tmp_path / "faces", name)
    spec = no_buckets(subset(tmp_path / "faces", face_crop_aug_range=SPAN), validation_split=0.5)
    data = build_train_data([spec], seed=1)
    assert data.validation is not None
    held = [batch.sizes_B6[row].tolist() for group in data.validation.epoch(0) for batch in group.micro_batches
            for row in range(batch.num_real)]  # fmt: skip
    assert held == [[480, 640, 0, 10, 64, 64]] * 2


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_report_shows_the_crops_of_training(tmp_path, epoch):
    for name in "abc":
        write_face(tmp_path / "faces", name)
    write_picture(tmp_path / "faces" / "plain.png", 160, 96)
    spec = no_buckets(subset(tmp_path / "faces", face_crop_aug_range=SPAN, random_crop=True, flip_aug=True))
    data = build_train_data([spec], seed=3)
    trained = {
        batch.keys[row].record: tuple(batch.sizes_B6[row].tolist())
        for group in data.epoch(epoch)
        for batch in group.micro_batches
        for row in range(batch.num_real)
    }
    found = inspect([spec], InspectionSettings(lambda captions: [0 for _ in captions], seed=3, epoch=epoch))
    assert {image.record.key: image.size_ids for image in found.images} == trained
    assert [size_ids(image.crop) for image in found.images] == [image.size_ids for image in found.images]
    assert "1 images have no face in their names" in report_text(found)
    # what is cut away around a face is meant to be
    cropped = {Path(problem.path).name for problem in found.problems if problem.kind == "cropped"}
    assert cropped == {"plain.png"}


def test_latents_are_not_made_of_images_with_many_looks(tmp_path):
    write_face(tmp_path / "faces", "a")
    table, _ = assemble([no_buckets(subset(tmp_path / "faces", face_crop_aug_range=SPAN))])
    with pytest.raises(AssertionError, match="one look"):
        build_latents(table, lambda: None, options=LatentCacheOptions("v"))

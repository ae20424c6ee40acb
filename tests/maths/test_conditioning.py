"""Size ids: the crop that was really made, and sd-scripts' own numbers; text conditioning as rows."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.diffusion.conditioning import TextCond, Tokens
from library.diffusion.crops import CropInfo, legacy_crop_ltrb, legacy_size_ids, size_ids
from library.sizes import Size

with open(Path(__file__).with_name("golden_conditioning.csv"), newline="") as file:
    GOLDEN = list(csv.DictReader(file))


def _size(text: str) -> Size:
    w, h = text.split("x")
    return Size(int(w), int(h))


def test_the_golden_tables_are_complete() -> None:
    assert [row["table"] for row in GOLDEN] == [table for table in "ABCD" for _ in range(16)]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['table']}-{row['image']}")
def test_legacy_numbers_reproduce_the_reference_tables(row: dict[str, str]) -> None:
    image, bucket = _size(row["image"]), _size(row["bucket"])
    expected = [float(edge) for edge in row["crop_ltrb"].split()]
    assert legacy_crop_ltrb(bucket, image) == pytest.approx(expected, abs=6e-4)
    for flipped, column in ((False, "top_left"), (True, "flipped_top_left")):
        top, left = map(int, row[column].split())
        crop = CropInfo(image, top=7, left=9, target=bucket, resized=Size(9999, 9999), flipped=flipped)
        assert legacy_size_ids(crop) == (image.h, image.w, top, left, bucket.h, bucket.w)


def test_the_real_crop_of_the_specs_example() -> None:
    crop = CropInfo(Size(3000, 2000), top=0, left=16, target=Size(1216, 832), resized=Size(1248, 832), flipped=False)
    assert size_ids(crop) == (2000, 3000, 0, 16, 832, 1216)
    assert legacy_size_ids(crop)[2:4] == (10, 0)


def test_order_is_height_before_width_and_top_before_left() -> None:
    crop = CropInfo(Size(1, 2), top=3, left=4, target=Size(5, 6), resized=Size(20, 30), flipped=False)
    assert size_ids(crop) == (2, 1, 3, 4, 6, 5)


@given(
    resized=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    target=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    data=st.data(),
)
def test_a_mirrored_sample_names_the_offset_in_the_mirrored_picture(resized, target, data) -> None:
    """Cutting at the named offset out of the mirrored picture gives the mirrored crop, pixel for pixel."""
    resized, target = Size(*resized), Size(*target)
    left = data.draw(st.integers(0, resized.w - target.w))
    top = data.draw(st.integers(0, resized.h - target.h))
    picture = np.arange(resized.area).reshape(resized.h, resized.w)
    sample = picture[top : top + target.h, left : left + target.w][:, ::-1]
    ids = size_ids(CropInfo(resized, top, left, target, resized, flipped=True))
    assert np.array_equal(picture[:, ::-1][ids[2] : ids[2] + target.h, ids[3] : ids[3] + target.w], sample)


def _cond(batch: int, seed: int) -> TextCond:
    generator = torch.Generator().manual_seed(seed)
    return TextCond(torch.randn(batch, 77, 8, generator=generator), torch.randn(batch, 5, generator=generator))


def test_joining_and_selecting_rows_are_inverse() -> None:
    parts = [_cond(1, 0), _cond(3, 1)]
    joined = TextCond.cat(parts)
    assert len(joined) == 4
    assert torch.equal(joined[1:].hidden_BTD, parts[1].hidden_BTD)
    assert torch.equal(joined[[0]].pooled_BP, parts[0].pooled_BP)
    with pytest.raises(AssertionError):
        joined[0]


def test_text_moves_and_casts_as_a_whole() -> None:
    half = _cond(2, 2).to("cpu", torch.float16)
    assert half.hidden_BTD.dtype == half.pooled_BP.dtype == torch.float16
    assert _cond(2, 2).to(dtype=torch.bfloat16).pooled_BP.dtype == torch.bfloat16


def test_tokens_move_with_and_without_weights() -> None:
    ids = torch.zeros(2, 1, 77, dtype=torch.long)
    plain = Tokens(ids, ids).to("meta")
    assert plain.ids_2_BnL.is_meta and plain.weights_1 is None and len(plain) == 2
    weighted = Tokens(ids, ids, torch.ones(2, 77), torch.ones(2, 77)).to("meta")
    assert weighted.weights_1.is_meta and weighted.weights_2.is_meta

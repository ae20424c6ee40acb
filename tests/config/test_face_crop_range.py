"""`face_crop_aug_range`: how it may be written, and where it acts."""

from pathlib import Path

import pytest

from library.config.cli import make_config
from library.config.dataset_file import dataset_specs
from library.config.spans import Span, parse_span
from library.errors import UserError

TRAINER = {
    "pretrained_model_name_or_path": "tiny",
    "resolution": 64,
    "network_module": "networks.lora",
    "output_dir": "out",
}
TWO = "[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir='a'\n{subset}\n[[datasets.subsets]]\nimage_dir='b'\n"


def _specs(folder: Path, *, dataset: str = "", subset: str = "", run: str = "sdxl_train_network", **changes):
    path = folder / "data.toml"
    path.write_text(TWO.format(dataset=dataset, subset=subset), encoding="utf-8")
    cfg = make_config(run, **{**TRAINER, "dataset_config": str(path), **changes})
    return dataset_specs(cfg), cfg


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with folders of images a and b; the current directory."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("value", ["2,4", " 2.0 , 4 ", [2, 4], (2.0, 4.0), ["2", 4]])
def test_a_span_is_read(value):
    assert parse_span(value) == Span(2.0, 4.0) == (2.0, 4.0)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("2", "pair"),
        ("", "pair"),
        ("2,4,6", "pair"),
        ("a,b", "pair"),
        (2.0, "pair"),
        ([True, 2], "pair"),
        (["nan", 2], "pair"),
        ([1, float("inf")], "pair"),
        (None, "pair"),
        ([[1], 2], "pair"),
        ([0, 2], "not above 0"),
        ("-1,2", "not above 0"),
        ([4, 2], "wrong order"),
    ],
)
def test_what_is_no_span_is_refused_with_an_example(value, what):
    with pytest.raises(ValueError, match=what) as caught:
        parse_span(value)
    assert '[2, 4] or "2,4"' in str(caught.value)


def test_the_flag_and_the_key_mean_the_same_and_the_nearest_counts(folder):
    one, two = _specs(folder, subset="face_crop_aug_range = [1, 2]", face_crop_aug_range="3,3")[0][0].subsets
    assert (one.face_crop_aug_range, two.face_crop_aug_range) == (Span(1, 2), Span(3, 3))
    one, two = _specs(folder)[0][0].subsets
    assert (one.face_crop_aug_range, two.face_crop_aug_range) == (None, None)
    assert not one.has_many_looks


def test_a_wrong_flag_is_named_with_its_value(problems_of):
    (problem,) = problems_of(face_crop_aug_range="4,2")
    assert problem.what.startswith('face_crop_aug_range = "4,2" has its numbers in the wrong order; write')


def test_with_buckets_it_has_no_effect_and_a_notice_says_where(folder):
    specs, cfg = _specs(
        folder, dataset="enable_bucket = true\nmin_bucket_reso = 64", subset="face_crop_aug_range=[1,2]"
    )
    assert [subset.face_crop_aug_range for subset in specs[0].subsets] == [None, None]
    (notice,) = cfg.notices
    assert notice.startswith("face_crop_aug_range has no effect in a: it acts without enable_bucket (")
    assert "data.toml line 1" in notice
    # so a cache has one look of each image, and is allowed
    assert _specs(folder, dataset="enable_bucket = true\nmin_bucket_reso = 64", face_crop_aug_range="1,2",
                  cache_latents=True)[0]  # fmt: skip


@pytest.mark.parametrize(
    ("run", "changes"),
    [
        ("cache_latents", {}),
        ("sdxl_train_network", {"cache_latents": True, "cache_in_background": True}),
        ("sdxl_train_network", {"cache_latents_to_disk": True}),
    ],
)
def test_no_cache_of_latents_can_hold_it(folder, run, changes):
    with pytest.raises(UserError) as caught:
        _specs(folder, subset="face_crop_aug_range = [1, 2]", run=run, **changes)
    (problem,) = caught.value.problems
    assert problem.what == "cache_latents keeps one crop of each image, so face_crop_aug_range cannot act in a"
    assert problem.fix == "leave out cache_latents or face_crop_aug_range"

"""Several resolutions: how they are written, which place counts, and what is refused."""

from pathlib import Path

import pytest

from library.config.cli import make_config, parse
from library.config.dataset_file import dataset_specs
from library.errors import UserError
from library.sizes import Size

SUBSET = "[[datasets.subsets]]\nimage_dir = 'a'\n"
BASE = {"pretrained_model_name_or_path": "tiny", "enable_bucket": True}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "train" / "1_a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


def spec_of(text, **options):
    Path("data.toml").write_text(text, encoding="utf-8")
    return dataset_specs(make_config("cache_latents", **BASE, dataset_config="data.toml", **options))[0]


def sizes(spec):
    return [str(size) for size in spec.resolutions]


def refusal(text, **options):
    with pytest.raises(UserError) as caught:
        spec_of(text, **options)
    return [problem.what for problem in caught.value.problems]


@pytest.mark.parametrize(
    "line", ["resolutions = [512, 768, [1024, 640]]", "resolution = [[512, 512], [768, 768], [1024, 640]]"]
)
def test_a_list_of_resolutions_has_two_spellings(line):
    spec = spec_of(f"[[datasets]]\n{line}\nresolution_weights = [1, 1, 2]\n{SUBSET}")
    assert spec.resolution == Size(512, 512) and sizes(spec) == ["512x512", "768x768", "1024x640"]
    assert spec.weights == (1.0, 1.0, 2.0)


def test_two_numbers_stay_width_and_height():
    spec = spec_of(f"[[datasets]]\nresolution = [512, 768]\n{SUBSET}")
    assert spec.resolutions == (Size(512, 768),) and spec.weights == (1.0,)
    assert sizes(spec_of(f"[[datasets]]\nresolutions = [512, 768]\n{SUBSET}")) == ["512x512", "768x768"]


def test_the_nearest_place_that_has_either_key_counts():
    general = "[general]\nresolutions = [512, 768]\nresolution_weights = [1, 3]\n"
    assert spec_of(f"{general}[[datasets]]\n{SUBSET}", resolution=1024).weights == (1.0, 3.0)
    assert sizes(spec_of(f"{general}[[datasets]]\nresolution = 640\n{SUBSET}")) == ["640x640"]
    weighted = spec_of(f"{general}[[datasets]]\nresolution_weights = [5, 2]\n{SUBSET}")
    assert (sizes(weighted), weighted.weights) == (["512x512", "768x768"], (5.0, 2.0))
    assert sizes(spec_of(f"[[datasets]]\n{SUBSET}", resolutions=["512", "768,512"])) == ["512x512", "768x512"]


def test_flags_give_them_too_and_beat_the_file():
    Path("run.toml").write_text(
        "pretrained_model_name_or_path = 'tiny'\ntrain_data_dir = 'train'\nenable_bucket = true\n"
        "resolution = [[512, 512], [768, 768]]\nresolution_weights = [1, 2]\n",
        encoding="utf-8",
    )

    def run(*flags):
        return dataset_specs(parse("cache_latents", ["--config_file", "run.toml", *flags]))[0]

    assert (sizes(run()), run().weights) == (["512x512", "768x768"], (1.0, 2.0))
    assert sizes(run("--resolution", "640")) == ["640x640"]
    assert run("--resolutions", "640", "512,768", "--resolution_weights", "1", "0.5").weights == (1.0, 0.5)


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ("resolutions = [512, 768, [512, 512]]", "resolutions has 512x512 more than once"),
        ("resolutions = [512, 768]\nresolution_weights = [1]", "resolution_weights has 1 numbers for 2 resolutions"),
        ("resolutions = [512, 768]\nresolution_weights = [1, 0]", "resolution_weights has 0, which is not above 0"),
        ("resolution = 512\nresolution_weights = [1]", "resolution_weights cannot act on a single resolution"),
        ("resolution = 512\nresolutions = [512, 768]", "resolution and resolutions are both given"),
        ("resolutions = [512, 1280]", "resolution 1280x1280 has a side above max_bucket_reso 1024"),
        ("resolutions = [128, 512]", "resolution 128x128 has a side below min_bucket_reso 256"),
    ],
)
def test_what_cannot_be_meant_is_refused(lines, what):
    assert refusal(f"[[datasets]]\n{lines}\n{SUBSET}") == [what]


def test_a_wrong_size_is_named_with_its_line():
    with pytest.raises(UserError) as caught:
        spec_of(f"[[datasets]]\nbatch_size = 2\nresolution = [[512, 512], [0, 5]]\n{SUBSET}")
    problem = caught.value.problems[0]
    assert "has a side below 1 pixel" in problem.what and "data.toml line" in problem.where

"""The dataset file and DreamBooth folders."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.config.cli import make_config
from library.config.dataset_file import dataset_specs, folder_name, read_datasets
from library.config.dataset_keys import DATASET_KEYS, SUBSET_KEYS, SUBSET_ONLY_KEYS
from library.config.toml_file import toml_value
from library.errors import UserError
from library.sizes import Size

VALUES = {
    "batch_size": st.integers(1, 9),
    "resolution": st.sampled_from([256, [512, 256]]),
    "enable_bucket": st.booleans(),
    "min_bucket_reso": st.sampled_from([64, 128]),
    "max_bucket_reso": st.sampled_from([1024, 2048]),
    "bucket_reso_steps": st.sampled_from([32, 64]),
    "bucket_no_upscale": st.booleans(),
    "bucket_selection": st.sampled_from(["sdscripts", "area"]),
    "bucket_max_crop": st.sampled_from([0.1, 0.25]),
    "bucket_max_upscale": st.sampled_from([1, 1.5]),
    "validation_split": st.sampled_from([0, 0.1, 1]),
    "validation_seed": st.integers(0, 9),
    "num_repeats": st.integers(1, 9),
    "caption_extension": st.sampled_from([".txt", ".tags"]),
    "caption_separator": st.sampled_from([",", ";"]),
    "shuffle_caption": st.booleans(),
    "keep_tokens": st.integers(0, 5),
    "keep_tokens_separator": st.sampled_from(["", "|||"]),
    "secondary_separator": st.sampled_from([";;", "/"]),
    "enable_wildcard": st.booleans(),
    "caption_prefix": st.sampled_from(["a", "b"]),
    "caption_suffix": st.sampled_from(["c", "d"]),
    "caption_dropout_rate": st.sampled_from([0.0, 0.1, 1]),
    "caption_dropout_every_n_epochs": st.integers(0, 3),
    "caption_tag_dropout_rate": st.sampled_from([0.0, 0.5]),
    "token_warmup_min": st.integers(0, 5),
    "token_warmup_step": st.sampled_from([0, 10, 0.5]),
    "flip_aug": st.booleans(),
    "color_aug": st.booleans(),
    "random_crop": st.booleans(),
    "face_crop_aug_range": st.sampled_from([[1.0, 2.0], [2.0, 4.0]]),
    "resize_interpolation": st.sampled_from(["lanczos", "area"]),
    "alpha_mask": st.booleans(),
}
RULES_OFF = {"pretrained_model_name_or_path": "tiny", "resolution": 512}


def _specs(text: str, folder: Path, *, suffix: str = ".toml", run: str = "cache_latents", **changes):
    path = folder / f"data{suffix}"
    path.write_text(text, encoding="utf-8")
    cfg = make_config(run, **{**RULES_OFF, "dataset_config": str(path), **changes})
    return dataset_specs(cfg), cfg


def _problems(text: str, folder: Path, **changes):
    with pytest.raises(UserError) as caught:
        _specs(text, folder, **changes)
    return [
        (problem.what, problem.where.replace(str(folder), ".").replace("\\", "/"), problem.fix)
        for problem in caught.value.problems
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with folders of images a and b; the current directory."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_key_is_covered_here():
    elsewhere = {"resolutions", "resolution_weights"}  # test_resolutions.py
    assert set(VALUES) | elsewhere == {*DATASET_KEYS, *SUBSET_KEYS}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_value_falls_through_subset_dataset_general_option(data, folder):
    key = data.draw(st.sampled_from(sorted(VALUES)))
    levels = ["option", "general", "dataset", *(["subset"] if key in SUBSET_KEYS else [])]
    given_at = {level: data.draw(VALUES[key]) for level in levels if data.draw(st.booleans())}
    line = {level: f"{key} = {toml_value(value)}" for level, value in given_at.items()}
    text = (
        f"[general]\n{line.get('general', '')}\n[[datasets]]\n{line.get('dataset', '')}\n"
        f"[[datasets.subsets]]\nimage_dir = 'a'\n{line.get('subset', '')}\n"
    )
    option = {**DATASET_KEYS, **SUBSET_KEYS}[key]
    changes = {option: given_at["option"]} if "option" in given_at else {}
    if key.startswith("bucket_"):
        changes["enable_bucket"] = True
    # the trainer, because the cache tools refuse what their caches cannot hold
    trainer = {"network_module": "networks.lora", "output_dir": "out"}
    specs, cfg = _specs(text, folder, run="sdxl_train_network", **trainer, **changes)
    owner = specs[0] if key in DATASET_KEYS else specs[0].subsets[0]
    winner = next((given_at[level] for level in reversed(levels) if level in given_at), cfg.get(option))
    expected = Size(winner, winner) if key == "resolution" and isinstance(winner, int) else winner
    assert getattr(owner, key) == (tuple(expected) if isinstance(expected, list) else expected)


def test_false_in_the_file_beats_true_on_the_command_line(folder):
    specs, _ = _specs("[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\nflip_aug=false\n", folder, flip_aug=True)
    assert not specs[0].subsets[0].flip_aug


def test_subset_keys_without_option(folder):
    text = "[general]\nclass_tokens='dog'\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\ncustom_attributes={x=1}\n"
    subset = _specs(text, folder)[0][0].subsets[0]
    assert (subset.class_tokens, subset.custom_attributes, subset.is_reg) == ("dog", {"x": 1}, False)


def test_json_means_the_same(folder):
    data = {"general": {"keep_tokens": 2}, "datasets": [{"resolution": [512, 256], "subsets": [{"image_dir": "a"}]}]}
    toml = "[general]\nkeep_tokens=2\n[[datasets]]\nresolution=[512,256]\n[[datasets.subsets]]\nimage_dir='a'\n"
    assert _specs(json.dumps(data), folder, suffix=".json")[0] == _specs(toml, folder)[0]


def test_every_problem_of_a_dataset_file_is_reported(folder):
    text = """[general]
caption_extenson = ".txt"
shuffle_caption = "yes"
[[datasets]]
image_dir = "a"
resolution = "big"
[[datasets.subsets]]
image_dir = "nowhere"
batch_size = 2
[[datasets.subsets]]
num_repeats = 2
face_crop_aug_range = [2.0, 1.0]
seed = 3
[[datasets]]
resolution = 512
"""
    assert _problems(text, folder) == [
        ("caption_extenson is not a key of [general]", "./data.toml line 2", "did you mean caption_extension?"),
        (
            'shuffle_caption = "yes" must be true or false, without quotes',
            "./data.toml line 3",
            "the default is shuffle_caption = false",
        ),
        ("batch_size cannot stand in subset 1", "./data.toml line 9", "move it to [[datasets]] or [general]"),
        ('face_crop_aug_range = [2.0, 1.0] has its numbers in the wrong order; write the low and the high one, such as '
         '[2, 4] or "2,4"', "./data.toml line 12", ""),
        ("seed is not a key of subset 2", "./data.toml line 13", _known_fix()),
        ("image_dir cannot stand in dataset 1", "./data.toml line 5", "move it to [[datasets.subsets]]"),
        ('resolution = "big" is not a resolution; write one number or width and height, such as 1024 or "1024,768"',
         "./data.toml line 6", ""),
        ("image_dir nowhere does not exist", "./data.toml line 8", "name an existing folder"),
        ("subset 2 has no image_dir", "./data.toml line 10", "name its folder of images, or a metadata_file"),
    ]  # fmt: skip


def _known_fix() -> str:
    keys = sorted({*SUBSET_KEYS, "class_tokens", "custom_attributes", *SUBSET_ONLY_KEYS})
    return f"known keys: {', '.join(keys)}"


@pytest.mark.parametrize(("key", "value", "wrong"), [("cache_info", True, 1.5), ("network_multiplier", 0.8, "x")])
def test_key_with_nothing_to_do_is_accepted_with_a_notice(folder, key, value, wrong):
    head = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\n"
    _, cfg = _specs(f"{head}{key} = {toml_value(value)}\n", folder)
    assert any(notice.startswith(f"{key} has no effect: ") for notice in read_datasets(cfg)[2])
    ((what, where, _),) = _problems(f"{head}{key} = {toml_value(wrong)}\n", folder)
    assert what.startswith(f"{key} = ") and where == "./data.toml line 4"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "the dataset file names no dataset"),
        ("[[datasets]]\n", "the dataset has no subset with images"),
        ("[datasets]\nresolution = 512\n", "datasets is not an array of tables"),
        ("[[datasets]]\n[datasets.subsets]\nimage_dir='a'\n", "subsets is not an array of tables"),
        ("datasets = [1]\n", "datasets holds 1, which is not a table"),
        ("general = 1\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\n", "general is not a table"),
        ("resolution = 512\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\n", "resolution cannot stand at the top"),
        ("[[dataset]]\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\n", "dataset cannot stand at the top level"),
        ("[[datasets]]\nresolution = 512\nresolution = 256\n", "datasets.resolution is given twice"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\nclass_tokens=1\n", "class_tokens = 1 must be a text"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir="C:\\train"\n', "holds a control character"),
    ],
)
def test_wrong_shape_of_a_dataset_file(folder, text, what):
    found = _problems(text, folder)
    assert what in found[0][0]


def test_wrong_json_files(folder):
    assert "is given twice" in _problems('{"general": {}, "general": {}}', folder, suffix=".json")[0][0]
    assert _problems('{\n"general": }', folder, suffix=".json")[0][1] == "./data.json line 2"
    assert "must hold an object" in _problems("[]", folder, suffix=".json")[0][0]
    assert "is of no known kind" in _problems("", folder, suffix=".yaml")[0][0]


def test_missing_folder_suggests_its_neighbour(folder):
    (folder / "images").mkdir()
    found = _problems("[[datasets]]\n[[datasets.subsets]]\nimage_dir='imagse'\n", folder)
    assert found[0][2] == "did you mean images?"


def test_resolution_is_needed_somewhere(folder):
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\n"
    ((what, where, fix),) = _problems(text, folder, resolution=None)
    assert (what, where) == ("the dataset has no resolution", "./data.toml line 1")
    assert "resolution = 1024" in fix


def test_wrong_resolution_is_reported_once(folder):
    text = "[[datasets]]\nresolution='big'\n[[datasets.subsets]]\nimage_dir=3\n"
    found = _problems(text, folder, resolution=None)
    assert [where for _, where, _ in found] == ["./data.toml line 4", "./data.toml line 2"]


def test_subsets_that_add_nothing_are_left_out_and_told(folder):
    text = "[[datasets]]\n" + "".join(
        f"[[datasets.subsets]]\nimage_dir='{name}'\nnum_repeats={repeats}\n"
        for name, repeats in (("a", 2), ("a", 3), ("b", 0))
    )
    specs, cfg = _specs(text, folder)
    assert [(subset.image_dir, subset.num_repeats) for subset in specs[0].subsets] == [("a", 2)]
    assert ["a is named twice" in cfg.notices[0], "b is ignored" in cfg.notices[1]] == [True, True]


def test_bucket_limits_become_multiples_of_the_steps(folder):
    text = (
        "[[datasets]]\nenable_bucket=true\nmin_bucket_reso=300\nmax_bucket_reso=1000\n"
        "[[datasets.subsets]]\nimage_dir='a'\n"
    )
    specs, cfg = _specs(text, folder)
    assert (specs[0].min_bucket_reso, specs[0].max_bucket_reso) == (256, 1024)
    assert [notice.split()[0] for notice in cfg.notices] == ["min_bucket_reso", "max_bucket_reso"]
    unbucketed, cfg = _specs(text.replace("true", "false"), folder)
    assert (unbucketed[0].min_bucket_reso, cfg.notices) == (300, [])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"bucket_reso_steps": 48}, "bucket_reso_steps 48 is not a multiple of 32"),
        ({"resolution": "1024,128"}, "has a side below min_bucket_reso 256"),
        ({"resolution": "1280,1024"}, "has a side above max_bucket_reso 1024"),
        ({"enable_bucket": False, "bucket_selection": "area"}, "bucket_selection cannot act without enable_bucket"),
        ({"enable_bucket": False, "bucket_max_crop": 0.1}, "bucket_max_crop cannot act without enable_bucket"),
        ({"enable_bucket": False, "bucket_max_upscale": 2}, "bucket_max_upscale cannot act without enable_bucket"),
        ({"bucket_no_upscale": True, "bucket_max_upscale": 2}, "bucket_max_upscale cannot act with bucket_no_upscale"),
        ({"cache_latents": True, "random_crop": True}, "random_crop cannot act in"),
        ({"cache_latents": True, "face_crop_aug_range": "2,4"}, "face_crop_aug_range cannot act in"),
        ({"cache_text_encoder_outputs": True, "shuffle_caption": True}, "shuffle_caption cannot act in"),
        ({"cache_text_encoder_outputs": True, "caption_tag_dropout_rate": 0.1}, "caption_tag_dropout_rate cannot act"),
        ({"cache_text_encoder_outputs": True, "enable_wildcard": True}, "enable_wildcard cannot act"),
        ({"cache_text_encoder_outputs": True, "token_warmup_step": 0.5}, "token_warmup_step cannot act"),
    ],
)
def test_rules_of_a_dataset(problems_of, changes, what):
    has_buckets = "face_crop_aug_range" not in changes
    (problem,) = problems_of(**{"enable_bucket": has_buckets, "network_train_unet_only": True, **changes})
    assert what in problem.what
    assert problem.fix


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"bucket_max_crop": 0}, "bucket_max_crop = 0 must be greater than 0"),
        ({"bucket_max_crop": 1}, "bucket_max_crop = 1 must be less than 1"),
        ({"bucket_max_upscale": 0.5}, "bucket_max_upscale = 0.5 must be at least 1"),
        ({"bucket_selection": "nearest"}, 'bucket_selection = "nearest" is not one of: sdscripts, area'),
    ],
)
def test_bucket_limits_have_ranges_as_options_and_as_keys(problems_of, folder, changes, what):
    assert [problem.what for problem in problems_of(enable_bucket=True, **changes)] == [what]
    (key, value), *_ = changes.items()
    text = f"[[datasets]]\nenable_bucket=true\n{key} = {toml_value(value)}\n[[datasets.subsets]]\nimage_dir='a'\n"
    assert _problems(text, folder)[0][:2] == (what, "./data.toml line 3")


@pytest.mark.parametrize("name", ["shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard"])
def test_several_cached_wordings_let_a_caption_vary(problems_of, name):
    changes = {"cache_text_encoder_outputs": True, "network_train_unet_only": True, name: True}
    changes |= {"caption_tag_dropout_rate": 0.5} if name == "caption_tag_dropout_rate" else {}
    (problem,) = problems_of(**changes)
    assert "set text_cache_variants" in problem.fix
    assert problems_of(**changes, text_cache_variants=4) == ()


def test_a_token_warm_up_cannot_be_cached_in_any_number_of_wordings(problems_of):
    changes = {"cache_text_encoder_outputs": True, "network_train_unet_only": True, "token_warmup_step": 10}
    (problem,) = problems_of(**changes, text_cache_variants=4, shuffle_caption=True)
    assert "token_warmup_step cannot act in" in problem.what and "text_cache_variants" not in problem.fix


def test_the_notice_about_idle_variants_looks_at_every_subset(folder):
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\n[[datasets.subsets]]\nimage_dir='b'\n"
    settings = {"cache_text_encoder_outputs": True, "network_train_unet_only": True, "text_cache_variants": 3}
    assert [
        "text_cache_variants has no effect" in notice for notice in _specs(text, folder, **settings)[1].notices
    ] == [True]
    assert _specs(text + "shuffle_caption=true\n", folder, **settings)[1].notices == []


def test_resolution_may_reach_the_bucket_limits(problems_of):
    assert problems_of(enable_bucket=True, resolution="1024,256") == ()


def test_rules_see_the_value_of_the_subset(folder):
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\nrandom_crop=true\n[[datasets.subsets]]\nimage_dir='b'\n"
    assert _problems(text, folder)[0][0].endswith("cannot act in a")
    alone = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\nrandom_crop=false\n"
    assert not _specs(alone, folder, random_crop=True)[0][0].subsets[0].random_crop


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("10_cat", (10, "cat")),
        ("2 _x", (2, "x")),
        ("5", (5, "")),
        ("3_a_b c", (3, "a_b c")),
        ("0_x", (0, "x")),
        ("-1_x", (-1, "x")),
        ("cat_10", (None, "")),
        ("1.5_x", (None, "")),
        ("", (None, "")),
    ],
)
def test_dreambooth_folder_names(name, expected):
    assert folder_name(name) == expected


def test_folders_become_subsets_in_the_order_of_their_names(folder):
    for name in ("3_dog", "10_cat", "0_off", "notes"):
        (folder / "train" / name).mkdir(parents=True)
    (folder / "train" / "5_file").touch()
    cfg = make_config("cache_latents", **RULES_OFF, train_data_dir="train", keep_tokens=1)
    (spec,) = dataset_specs(cfg)
    found = [(Path(subset.image_dir).name, subset.num_repeats, subset.class_tokens) for subset in spec.subsets]
    assert found == [("10_cat", 10, "cat"), ("3_dog", 3, "dog")]
    assert {subset.keep_tokens for subset in spec.subsets} == {1}
    assert [Path(notice.split(" is ignored")[0]).name for notice in cfg.notices] == ["0_off", "notes"]


def test_folder_without_such_names_is_refused(folder):
    with pytest.raises(UserError) as caught:
        make_config("cache_latents", **RULES_OFF, train_data_dir=".")
    assert "holds no folder such as 10_cat" in caught.value.problems[0].what


def test_dataset_file_takes_the_place_of_the_folder(folder):
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\n"
    specs, cfg = _specs(text, folder, train_data_dir="nowhere")
    assert len(specs) == 1
    assert cfg.notices == ["train_data_dir is ignored: the data is named by dataset_config"]


SUBSET = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\n"


def test_conditioning_data_dir_holds_masks_or_condition_images(folder):
    text = f"{SUBSET}conditioning_data_dir = 'b'\n"
    (spec,), _ = _specs(text, folder, masked_loss=True, alpha_mask=True)
    assert (spec.subsets[0].mask_dir, spec.subsets[0].control_dir, spec.subsets[0].alpha_mask) == ("b", None, False)
    (spec,), _ = _specs(text, folder)
    assert (spec.subsets[0].mask_dir, spec.subsets[0].control_dir) == (None, "b")
    (spec,), _ = _specs(SUBSET, folder, alpha_mask=True)
    assert spec.subsets[0].alpha_mask and spec.subsets[0].has_masks
    twice = f"{text}[[datasets.subsets]]\nimage_dir='a'\n"
    (spec,), cfg = _specs(twice, folder, masked_loss=True)
    assert len(spec.subsets) == 2 and not cfg.notices, "the same images with and without masks are two subsets"


@pytest.mark.parametrize(
    ("lines", "changes", "what", "line"),
    [
        ("conditioning_data_dir = 'nowhere'", {}, "conditioning_data_dir nowhere does not exist", 4),
        ("conditioning_data_dir = './a'", {}, "conditioning_data_dir is the folder of the images themselves", 4),
        ("conditioning_data_dir = 3", {}, "conditioning_data_dir = 3 must be a text in quotes", 4),
        (
            "conditioning_data_dir = 'b'\nalpha_mask = true",
            {"masked_loss": True},
            "alpha_mask and conditioning_data_dir name two masks for each image",
            5,
        ),
        (
            "conditioning_data_dir = 'b'\n[[datasets.subsets]]\nimage_dir = 'b'",
            {},
            "a dataset has subsets with condition images and subsets without",
            1,
        ),
        ("", {"masked_loss": True}, "masked_loss has no mask to act with", None),
        ("", {"masked_loss_normalize": "area"}, "masked_loss_normalize has no mask to act with", None),
    ],
)
def test_masks_and_condition_images_that_cannot_be(folder, lines, changes, what, line):
    ((found, where, fix),) = _problems(SUBSET + lines, folder, **changes)
    assert found == what
    assert where == f"./data.toml line {line}" if line else where.endswith("argument")
    assert fix or "must be" in what


def test_a_trainer_without_condition_images_refuses_them(folder, complete):
    (folder / "data.toml").write_text(f"{SUBSET}conditioning_data_dir = 'b'\n")
    with pytest.raises(UserError) as caught:
        make_config("sdxl_train_network", **{**complete, "dataset_config": "data.toml"})
    (problem,) = caught.value.problems
    assert problem.what == "this run uses no condition images, so conditioning_data_dir cannot act in a"
    assert "set masked_loss" in problem.fix
    make_config("sdxl_train_network", **{**complete, "dataset_config": "data.toml", "masked_loss": True})


@pytest.mark.parametrize(
    ("lines", "what", "line"),
    [
        ("is_validation = true", "every subset is held out by is_validation", None),
        ("is_validation = true\nis_reg = true", "is_reg and is_validation exclude each other", 4),
        (
            "[[datasets.subsets]]\nimage_dir='a'\nis_validation = true",
            "a is trained on and held out by is_validation",
            1,
        ),
        ("is_validation = 1", "is_validation = 1 must be true or false, without quotes", 4),
        ("validation_split = 0.1", "validation_split cannot stand in subset 1", 4),
    ],
)
def test_held_out_images_that_cannot_be(folder, lines, what, line):
    ((found, where, _),) = _problems(SUBSET + lines, folder)
    assert found == what
    assert line is None or where == f"./data.toml line {line}"


def test_a_share_above_1_is_refused(problems_of):
    (problem,) = problems_of(validation_split=1.5)
    assert problem.what == "validation_split = 1.5 must be at most 1"

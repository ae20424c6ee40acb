"""Metadata files and regularisation folders in the configuration."""

import pytest

from library.config.cli import make_config
from library.config.dataset_file import dataset_specs
from library.errors import UserError

HEAD = "[[datasets]]\n[[datasets.subsets]]\n"
NEXT = "[[datasets.subsets]]\n"
COMPLETE = {
    "pretrained_model_name_or_path": "tiny", "resolution": 512, "network_module": "networks.lora", "output_dir": "out"
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Folders a, b, train/2_cat and reg/1_animal, and two metadata files."""
    for name in ("a", "b", "train/2_cat", "reg/1_animal", "empty"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("m.json", "n.jsonl"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(text=None, **changes):
    if text is not None:
        with open("data.toml", "w", encoding="utf-8") as file:
            file.write(text)
        changes["dataset_config"] = "data.toml"
    return make_config("sdxl_train_network", **{**COMPLETE, **changes})


def problem(text=None, **changes):
    with pytest.raises(UserError) as caught:
        config(text, **changes)
    (found,) = caught.value.problems
    assert found.fix
    return found


def test_a_metadata_subset_may_do_without_a_folder():
    cfg = config(f"{HEAD}metadata_file='m.json'\n{NEXT}metadata_file='n.jsonl'\nimage_dir='a'\nnum_repeats=3\n")
    first, second = dataset_specs(cfg)[0].subsets
    assert (first.metadata_file, first.image_dir, first.source, first.num_repeats) == ("m.json", "", "metadata_json", 1)
    assert (second.metadata_file, second.image_dir, second.num_repeats) == ("n.jsonl", "a", 3)


def test_one_metadata_file_counts_once_in_a_dataset():
    cfg = config(f"{HEAD}metadata_file='m.json'\n{NEXT}metadata_file='m.json'\nimage_dir='a'\n")
    assert len(dataset_specs(cfg)[0].subsets) == 1
    assert "m.json is named twice in one dataset" in cfg.notices[0]


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        (f"{HEAD}image_dir='a'\n{NEXT}metadata_file='m.json'\n", "with metadata_file and subsets without", 5),
        (f"{HEAD}metadata_file='m.jsn'\n", "metadata_file m.jsn does not exist", 3),
        (f"{HEAD}metadata_file='m.json'\nimage_dir='c'\n", "image_dir c does not exist", 4),
        (f"{HEAD}metadata_file='m.json'\nis_reg=true\n", "is_reg cannot act in a subset with metadata_file", 4),
        (f"{HEAD}metadata_file='m.json'\nclass_tokens='x'\n", "class_tokens cannot act", 4),
        (f"{HEAD}image_dir='a'\nis_reg=true\n", "regularisation images and no training images", 1),
    ],
)
def test_subsets_that_cannot_be(text, what, line):
    found = problem(text)
    assert what in found.what
    assert found.where == f"data.toml line {line}"


def test_is_reg_is_a_boolean():
    with pytest.raises(UserError, match='is_reg = "yes" must be true or false, without quotes'):
        config(f"{HEAD}image_dir='a'\nis_reg='yes'\n")


def test_regularisation_folders_carry_the_prior_loss_weight():
    cfg = config(train_data_dir="train", reg_data_dir="reg", prior_loss_weight=0.5)
    found = [
        (subset.class_tokens, subset.num_repeats, subset.is_reg, subset.loss_weight)
        for subset in dataset_specs(cfg)[0].subsets
    ]
    assert found == [("cat", 2, False, 1.0), ("animal", 1, True, 0.5)]
    cfg = config(f"{HEAD}image_dir='a'\n{NEXT}image_dir='b'\nis_reg=true\n", prior_loss_weight=0.5)
    assert [subset.loss_weight for subset in dataset_specs(cfg)[0].subsets] == [1.0, 0.5]


def test_a_regularisation_folder_must_hold_named_folders():
    assert "reg_data_dir nowhere does not exist" in problem(train_data_dir="train", reg_data_dir="nowhere").what
    assert "reg_data_dir empty holds no folder" in problem(train_data_dir="train", reg_data_dir="empty").what


def test_in_json_is_one_metadata_subset_of_train_data_dir():
    cfg = config(in_json="m.json", train_data_dir="a", dataset_repeats=4)
    (subset,) = dataset_specs(cfg)[0].subsets
    assert (subset.metadata_file, subset.image_dir, subset.num_repeats) == ("m.json", "a", 4)
    assert cfg.notices == []
    assert dataset_specs(config(in_json="m.json"))[0].subsets[0].image_dir == ""
    assert "in_json x.json does not exist" in problem(in_json="x.json").what
    assert "train_data_dir c does not exist" in problem(in_json="m.json", train_data_dir="c").what


def test_a_dataset_file_takes_the_place_of_both():
    cfg = config(f"{HEAD}image_dir='a'\n", in_json="m.json", reg_data_dir="reg")
    assert [notice.split(" is ignored")[0] for notice in cfg.notices] == ["reg_data_dir", "in_json"]

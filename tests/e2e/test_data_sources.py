"""Training from a metadata file, and with regularisation images, through the real scripts."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from tests.e2e.conftest import log_of
from tools import merge_captions_to_metadata


def metadata_of(output) -> dict[str, str]:
    with safe_open(output / "net.safetensors", "pt") as file:
        return file.metadata()


def test_a_merged_metadata_file_trains_like_its_folder(train, pictures, tmp_path):
    meta = tmp_path / "meta.json"
    folder = pictures / "2_thing"
    flags = ["--caption_extension", ".txt"]
    assert merge_captions_to_metadata.main([str(folder), str(meta), *flags]) == 0
    from_folder = train("folder", "--max_train_steps=3")
    in_json = [f"--in_json={meta}", f"--train_data_dir={folder}", "--dataset_repeats=2", "--max_train_steps=3"]
    from_file = train("file", *in_json)
    losses = [[record["loss"] for record in log_of(output) if "loss" in record] for output in (from_folder, from_file)]
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    found = metadata_of(from_file)
    assert json.loads(found["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 2, "img_count": 7}}


def test_the_prior_loss_weight_acts(train, pictures, tmp_path):
    reg = tmp_path / "reg" / "1_other"
    (pictures / "2_thing").rename(tmp_path / "2_thing")
    (pictures / "1_thing").mkdir()
    reg.mkdir(parents=True)
    for index, path in enumerate(sorted((tmp_path / "2_thing").iterdir())):
        path.rename((reg if index < 6 else pictures / "1_thing") / path.name)
    losses = {}
    for weight in ("1", "0.5", "0"):
        flags = [f"--reg_data_dir={tmp_path / 'reg'}", f"--prior_loss_weight={weight}", "--max_train_epochs=1"]
        output = train(f"w{weight}", *flags, "--network_train_unet_only", "--learning_rate=1e-12")
        losses[weight] = [record["loss"] for record in log_of(output) if "loss" in record]
        found = metadata_of(output)
        assert (found["ss_num_train_images"], found["ss_num_reg_images"]) == ("4", "3")
        assert json.loads(found["ss_reg_dataset_dirs"]) == {"1_other": {"n_repeats": 1, "img_count": 3}}
        assert float(found["ss_prior_loss_weight"]) == float(weight)
    assert losses["1"] != losses["0.5"] != losses["0"]
    for full, half, none in zip(losses["1"], losses["0.5"], losses["0"], strict=True):
        assert abs((full + none) / 2 - half) < 1e-5


def _losses(output) -> list[float]:
    return [record["loss"] for record in log_of(output) if "loss" in record]


@pytest.fixture
def masks(pictures, tmp_path):
    """dataset_config with masks whose left half is white; and the folder of the masks."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in (pictures / "2_thing").glob("*.png"):
        mask = np.zeros(Image.open(path).size[::-1], np.uint8)
        mask[:, : mask.shape[1] // 2] = 255
        Image.fromarray(mask).save(folder / path.name)
    config = tmp_path / "data.toml"
    config.write_text(
        f"[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = {str(pictures / '2_thing')!r}\n"
        f"conditioning_data_dir = {str(folder)!r}\n"
    )
    return config, folder


def test_masked_loss_trains_from_caches_on_disk_as_without(train, masks):
    config, folder = masks
    flags = [f"--dataset_config={config}", "--masked_loss", "--flip_aug", "--max_train_steps=4"]
    first = train("first", *flags, "--cache_latents_to_disk")
    assert len(_losses(first)) == 4
    assert _losses(train("again", *flags, "--cache_latents_to_disk")) == _losses(first), "from the files"
    assert _losses(train("memory", *flags, "--cache_latents")) == _losses(first)
    by_area = _losses(train("area", *flags, "--cache_latents_to_disk", "--masked_loss_normalize=area"))
    assert by_area[0] == pytest.approx(2 * _losses(first)[0], rel=1e-5)
    with np.load(next((folder.parent / "train" / "2_thing").glob("*.npz"))) as file:
        assert sorted(np.unique(file["alpha_mask"]).tolist()) == [0.0, 1.0]
    for path in folder.glob("*.png"):
        Image.new("L", Image.open(path).size, 255).save(path)
    white = _losses(train("white", *flags, "--cache_latents_to_disk"))
    config.write_text("".join(line for line in config.open() if "conditioning" not in line))
    del flags[1]
    assert white == _losses(train("none", *flags, "--cache_latents_to_disk")) != _losses(first)


def test_held_out_images_are_not_trained_on_and_are_cached(train, pictures, capfd):
    flags = ["--validation_split=0.3", "--validation_seed=5", "--max_train_epochs=1", "--network_train_unet_only"]
    output = train("held", *flags, "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    text = capfd.readouterr().err
    assert "2 images held out for validation" in text and "on 2 held out" in text
    found = metadata_of(output)
    assert (found["ss_num_train_images"], found["ss_num_validation_images"]) == ("10", "2")
    assert (found["ss_validation_split"], found["ss_validation_seed"]) == ("0.3", "5")
    assert found["ss_validate_every_n_epochs"] == found["ss_max_validation_steps"] == "None"
    assert len(list((pictures / "2_thing").glob("*_sdxl.npz"))) == 7
    assert len(list((pictures / "2_thing").glob("*_te_outputs.npz"))) == 7

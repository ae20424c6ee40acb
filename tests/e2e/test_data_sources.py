"""Training from a metadata file, and with regularisation images, through the real scripts."""

import json

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

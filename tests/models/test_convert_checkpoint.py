"""Single file to diffusers folder and back: every tensor, the header and the prediction type survive."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.models import checkpoint
from library.models.convert_tool import convert
from tools.convert_checkpoint import main


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_file_of_mixed_precision_comes_back_identical(tiny_path, tmp_path):
    tensors = load_file(tiny_path)
    for name in [name for name in tensors if name.startswith("conditioner.embedders.0.")]:
        tensors[name] = tensors[name].float() + 1e-5
    tensors["v_pred"] = torch.empty(0)
    tensors["ztsnr"] = torch.empty(0)
    tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.605)
    source, back = tmp_path / "source.safetensors", tmp_path / "back.safetensors"
    save_file(tensors, source, header(tiny_path) | {"modelspec.title": "mine", "modelspec.prediction_type": "v"})
    assert main([str(source), str(tmp_path / "folder")]) == 0
    assert main([str(tmp_path / "folder"), str(back)]) == 0
    assert_identical(load_file(back), tensors)
    assert header(back)["modelspec.title"] == "mine" and header(back)["modelspec.prediction_type"] == "v"
    scheduler = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]
    assert json.loads((tmp_path / "folder" / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    stated = checkpoint.read_stated(str(back))
    assert stated.prediction_type == "v_prediction" and stated.zero_terminal_snr


def test_the_folder_is_the_one_that_a_loaded_model_writes(tiny_path, folder, tmp_path):
    """`folder` was written from modules in memory; diffusers reads it in other tests."""
    target = tmp_path / "folder"
    assert main(["tiny", str(target)]) == 0
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(target) for path in target.rglob("*") if path.is_file())
    for name in names:
        if name.suffix == ".safetensors":
            assert_identical(load_file(target / name), load_file(folder / name))
        else:
            assert (target / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("flag", ["--bf16", "--save_precision_as=bf16"])
def test_the_precision_is_cast_as_asked(tiny_path, tmp_path, flag):
    assert main(["tiny", str(tmp_path / "half.safetensors"), flag, '--metadata={"modelspec.author": "me"}']) == 0
    expected = {name: tensor.bfloat16() for name, tensor in load_file(tiny_path).items()}
    assert_identical(load_file(tmp_path / "half.safetensors"), expected)
    assert header(tmp_path / "half.safetensors")["modelspec.author"] == "me"


def test_what_is_left_out_is_said(tiny_path, tmp_path, capsys):
    tensors = load_file(tiny_path)
    tensors["model_ema.decay"] = torch.tensor(0.9)
    tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, tmp_path / "more.safetensors", header(tiny_path))
    assert main([str(tmp_path / "more.safetensors"), str(tmp_path / "folder")]) == 0
    printed = capsys.readouterr().out
    assert "model_ema.decay" in printed and "position numbers" in printed


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["tiny", "{}/a.ckpt"], "only safetensors"),
        (["tiny", "{}/a.safetensors", "--fp16", "--bf16"], "several precisions"),
        (["{}/nothing.safetensors", "{}/a.safetensors"], "no such checkpoint"),
        (["tiny", "{}/a.safetensors", "--metadata=x"], "not JSON"),
        (["tiny", "{}"], "other things"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, what, tmp_path, capsys):
    (tmp_path / "photo.png").write_bytes(b"")
    assert main([text.format(tmp_path) for text in arguments]) == 2
    assert what in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_conversion_holds_a_few_tensors_at_a_time(tiny_path, tmp_path, monkeypatch):
    import gc

    from library.io import safetensors_file

    def alive():
        return sum(type(each) is torch.Tensor and each.device.type == "cpu" for each in gc.get_objects())

    original, counts = safetensors_file.TensorReader.__getitem__, []

    def counted(self, name):
        tensor = original(self, name)
        counts.append(alive() if len(counts) % 200 == 0 else 0)
        return tensor

    gc.collect()
    before = alive()
    monkeypatch.setattr(safetensors_file.TensorReader, "__getitem__", counted)
    assert main(["tiny", str(tmp_path / "out.safetensors")]) == 0
    assert len(counts) > 1000
    assert max(counts) - before < 30


class Counted:
    """Stands in for a progress bar: how many units it was made for, and how many it was told."""

    def __init__(self, total):
        self.total, self.done = total, 0

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        pass

    def update(self, count):
        self.done += count


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_bar_ends_where_it_should(tiny_path, tmp_path, kind):
    bars = []
    target = tmp_path / ("out.safetensors" if kind == "file" else "out")
    convert(Path(tiny_path), target, dtype=None, metadata={}, bar=lambda total: bars.append(Counted(total)) or bars[0])
    assert len(bars) == 1 and bars[0].total > 1000 and bars[0].done == bars[0].total

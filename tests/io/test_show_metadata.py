"""Headers shown and edited: the tensors' bytes and the hashes stay what they were."""

import base64
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.io.hashing import network_hashes
from library.io.header_edit import data_hash, legacy_hash
from library.io.safetensors_file import save
from tools.show_metadata import main

PNG = base64.b64encode(b"\x89PNG picture").decode()
TAGS = {"10_cat": {"cat": 10, " red": 7}, "others": {"cat": 2, "dog": 3}}
METADATA = {
    "ss_tag_frequency": json.dumps(TAGS),
    "ss_dataset_dirs": json.dumps({"10_cat": {"n_repeats": 10, "img_count": 5}}),
    "ss_learning_rate": "0.0001",
    "ss_clip_skip": "None",
    "ss_network_args": json.dumps({"conv_dim": "4"}),
    "modelspec.title": "Cats",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.resolution": "1024x1024",
    "modelspec.thumbnail": f"data:image/png;base64,{PNG}",
    "note": "ünï",
}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "b.lora_up.weight": torch.randn(700, 600, generator=generator),
        "a.alpha": torch.tensor(1.0),
        "a.half": torch.randn(9, 3, generator=generator).half(),
    }


@pytest.fixture
def lora(tensors, tmp_path):
    """More than 1 MiB, so that the short hash reads something."""
    path = tmp_path / "net.safetensors"
    hashes = dict(zip(("sshs_model_hash", "sshs_legacy_hash"), network_hashes(tensors, METADATA), strict=True))
    save(tensors, path, METADATA | hashes)
    return path


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_what_is_shown(lora, capsys):
    assert main([str(lora), "--top=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "Cats" in text and "stable-diffusion-xl-v1-base/lora" in text and "1024x1024" in text
    tags = lines.index("tags (3, the 2 most frequent)")
    assert [line.split() for line in lines[tags + 1 : tags + 3]] == [["12", "cat"], ["7", "red"]]
    assert "  10_cat: 5 images x 10" in lines
    assert any(line.split() == ["learning_rate", "0.0001"] for line in lines)
    assert "(right)" in text and "clip_skip" not in text
    assert "2 F32, 1 F16" in lines[0]


def test_a_hash_of_other_tensors_is_told(lora, capsys):
    content = bytearray(lora.read_bytes())
    content[-1] ^= 1
    lora.write_bytes(content)
    assert main([str(lora)]) == 0
    assert "NOT that of these tensors" in capsys.readouterr().out


def test_json_holds_everything(lora, capsys):
    assert main(["--model", str(lora), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ss_tag_frequency"] == TAGS and found["ss_network_args"] == {"conv_dim": "4"}
    assert found["note"] == "ünï" and found.keys() >= METADATA.keys()


def test_edits_leave_tensors_and_hashes_valid(lora, tensors, capsys):
    before, bytes_before = header(lora), data_hash(lora)
    edits = ["--edit=modelspec.title=Röd = red", "--edit", "ss_training_comment=" + "long " * 99]
    assert main([str(lora), *edits, "--remove=ss_learning_rate", "--remove=note"]) == 0
    found = header(lora)
    assert found["modelspec.title"] == "Röd = red" and "ss_learning_rate" not in found and "note" not in found
    changed = {"modelspec.title", "ss_training_comment", "ss_learning_rate", "note", "sshs_legacy_hash"}
    assert {key: v for key, v in found.items() if key not in changed} == {
        key: v for key, v in before.items() if key not in changed
    }
    again = load_file(lora)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert data_hash(lora) == bytes_before == found["sshs_model_hash"]
    # what the writer of networks would compute for these texts
    assert network_hashes(tensors, found) == (found["sshs_model_hash"], found["sshs_legacy_hash"])
    assert found["sshs_legacy_hash"] != before["sshs_legacy_hash"] and legacy_hash(lora) == found["sshs_legacy_hash"]
    assert [each.name for each in lora.parent.iterdir()] == [lora.name]


def test_an_edit_can_go_to_another_file(lora, tmp_path):
    before = lora.read_bytes()
    assert main([str(lora), "--edit=a=b", f"--save_to={tmp_path / 'other.safetensors'}"]) == 0
    assert lora.read_bytes() == before
    assert header(tmp_path / "other.safetensors")["a"] == "b"


def test_thumbnails_go_out_and_in(lora, tmp_path):
    assert main([str(lora), f"--thumbnail={tmp_path / 'out.png'}"]) == 0
    assert (tmp_path / "out.png").read_bytes() == base64.b64decode(PNG)
    (tmp_path / "new.png").write_bytes(b"new")
    assert main([str(lora), f"--edit=modelspec.thumbnail={tmp_path / 'new.png'}"]) == 0
    assert main([str(lora), f"--thumbnail={tmp_path / 'out.png'}"]) == 0
    assert (tmp_path / "out.png").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--edit=novalue"], "not key=value"),
        (["--edit=sshs_model_hash=1"], "computed from the tensors"),
        (["--remove=nothing"], "no nothing in the header"),
        (["--edit=note=1", "--remove=note"], "both edited and removed"),
        (["--save_to=x.safetensors"], "needs edit or remove"),
    ],
)
def test_edits_without_sense_are_refused_and_nothing_is_written(lora, flags, what, capsys):
    before = lora.read_bytes()
    assert main([str(lora), *flags]) == 2
    assert what in capsys.readouterr().err
    assert lora.read_bytes() == before and len(list(lora.parent.iterdir())) == 1


def test_broken_files_and_files_without_texts(lora, tmp_path, capsys):
    lora.write_bytes(lora.read_bytes()[:-5])
    assert main([str(lora), "--edit=a=b"]) == 2
    assert "cut short" in capsys.readouterr().err
    save({"x": torch.ones(2)}, tmp_path / "plain.safetensors")
    assert main([str(tmp_path / "plain.safetensors")]) == 0
    assert "no texts" in capsys.readouterr().out
    assert main([str(tmp_path / "plain.safetensors"), f"--thumbnail={tmp_path / 'x.png'}"]) == 2
    assert main([]) == 2

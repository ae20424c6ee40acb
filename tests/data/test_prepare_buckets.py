"""prepare_buckets_latents.py: sd-scripts' arguments in, its JSON out, and latents that training finds."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_buckets_latents
from library.models.families import sdxl
from tests.data.specs import SIZES, write_folder, write_picture
from tests.ranks import two_ranks

ROOT = Path(__file__).resolve().parents[2]
NUM = len(SIZES)
BUCKETS = ["--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "32"]
FLAGS = ["--max_resolution", "64,64", *BUCKETS, "--batch_size", "2"]


@pytest.fixture
def images(tmp_path):
    """Seven pictures, and captions for two of them and for one that is missing."""
    entries = {"p0": {"caption": "a café"}, "p1.png": {"tags": "b"}, "gone": {"caption": "c"}}
    (tmp_path / "in.json").write_text(json.dumps(entries), encoding="utf-8")
    return write_folder(tmp_path / "imgs")


def arguments(images, *flags, out="out.json"):
    return [str(images), str(images.parent / "in.json"), str(images.parent / out), "tiny", *FLAGS, *flags]


def prepare(images, capsys, *flags, out="out.json"):
    """The lines that the tool prints, and what it writes; it has to succeed."""
    capsys.readouterr()
    assert prepare_buckets_latents.main(arguments(images, *flags, out=out)) == 0
    text = (images.parent / out).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2)
    return capsys.readouterr().out.splitlines(), json.loads(text)


def cache_latents(images, capsys, *flags):
    """What the trainer's own pass says when it is given the metadata file."""
    spec = importlib.util.spec_from_file_location("cache_latents", ROOT / "tools" / "cache_latents.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    named = ["--in_json", str(images.parent / "out.json"), "--train_data_dir", str(images)]
    model = ["--pretrained_model_name_or_path", "tiny", "--resolution", "64,64", "--enable_bucket"]
    capsys.readouterr()
    assert tool.main([*named, *model, *BUCKETS, *flags]) == 0
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_every_image_has_an_entry_and_latents_that_training_reuses(images, capsys, monkeypatch):
    lines, entries = prepare(images, capsys)
    assert lines[-2:] == [
        "latents: built 7, reused 0, stale 0, failed 0",
        f"8 entries in {images.parent / 'out.json'}, 5 of them new",
    ]
    assert lines[0] == "1 entries have no image in the folder and stay as they are: gone"
    assert list(entries) == ["p0", "p1.png", "gone", "p2", "p3", "p4", "p5", "p6"]
    assert entries["p0"] == {"caption": "a café", "train_resolution": [64, 64], "image_size": [64, 64]}
    assert entries["p1.png"] == {"tags": "b", "train_resolution": [96, 32], "image_size": [96, 40]}
    assert entries["gone"] == {"caption": "c"}
    for name, (width, height) in zip([f"p{number}" for number in range(NUM)], SIZES, strict=True):
        bucket = (entries.get(name) or entries[f"{name}.png"])["train_resolution"]
        with np.load(images / f"{name}_{width:04d}x{height:04d}_sdxl.npz") as entry:
            assert entry["latents"].shape == (4, bucket[1] // 8, bucket[0] // 8)
            assert entry["original_size"].tolist() == [width, height]
    before = json.loads((images.parent / "in.json").read_text(encoding="utf-8"))
    assert before == {"p0": {"caption": "a café"}, "p1.png": {"tags": "b"}, "gone": {"caption": "c"}}
    from library.data import file_facts

    def opened(path):
        raise AssertionError(f"{path} was opened for its size")

    monkeypatch.setattr(file_facts, "read_size", opened)
    assert cache_latents(images, capsys) == "built 0, reused 7, stale 0, failed 0"


def test_a_second_run_encodes_only_what_changed(images, capsys):
    prepare(images, capsys)
    assert prepare(images, capsys)[0][-2] == "latents: built 0, reused 7, stale 0, failed 0"
    write_picture(images / "p0.png", 64, 64, seed=50)
    assert prepare(images, capsys, "--skip_existing")[0][-2] == "latents: built 0, reused 7, stale 0, failed 0"
    assert prepare(images, capsys)[0][-2] == "latents: built 1, reused 6, stale 1, failed 0"
    assert prepare(images, capsys, "--flip_aug")[0][-2] == "latents: built 7, reused 0, stale 7, failed 0"
    assert cache_latents(images, capsys, "--flip_aug") == "built 0, reused 7, stale 0, failed 0"


def test_an_interrupted_run_goes_on_where_it_stopped(images, capsys, monkeypatch):
    calls, encode_image = [], sdxl.encode_image

    def interrupted(*given):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return encode_image(*given)

    monkeypatch.setattr(sdxl, "encode_image", interrupted)
    assert prepare_buckets_latents.main(arguments(images)) == 130
    built = len(list(images.glob("*_sdxl.npz")))
    assert 0 < built < NUM and not (images.parent / "out.json").exists()
    monkeypatch.setattr(sdxl, "encode_image", encode_image)
    lines, entries = prepare(images, capsys)
    assert lines[-2] == f"latents: built {NUM - built}, reused {built}, stale 0, failed 0"
    assert len([entry for entry in entries.values() if "train_resolution" in entry]) == NUM


def test_two_processes_write_what_one_writes(images, capsys):
    printed = "".join(two_ranks("prepare_buckets_latents", arguments(images), images.parent))
    assert printed.count("latents: built 7, reused 0, stale 0, failed 0") == 1
    together = {path.name: path.read_bytes() for path in images.glob("*.npz")}
    for path in images.glob("*.npz"):
        path.unlink()
    assert prepare(images, capsys, out="one.json")[0][-2] == "latents: built 7, reused 0, stale 0, failed 0"
    assert (images.parent / "out.json").read_bytes() == (images.parent / "one.json").read_bytes()
    assert {path.name: path.read_bytes() for path in images.glob("*.npz")} == together


def test_sub_folders_and_paths(images, capsys):
    write_picture(images / "deep" / "p0.png", 40, 64)
    (images.parent / "in.json").write_text('{"p0.png": {"caption": "a"}}', encoding="utf-8")
    _, entries = prepare(images, capsys, "--full_path", "--recursive")
    assert list(entries)[:2] == ["p0.png", str(images / "deep" / "p0.png")]
    assert entries[str(images / "deep" / "p0.png")]["image_size"] == [40, 64] and len(entries) == NUM + 1
    assert cache_latents(images, capsys) == "built 0, reused 8, stale 0, failed 0"


def test_bad_images_are_named_and_not_offered(images, capsys, caplog):
    (images / "p0.png").write_bytes(b"no picture")
    # the header of the last one is whole, so that it fails when it is to be encoded
    picture = images / "p6.jpg"
    Image.fromarray(np.zeros((200, 300, 3), np.uint8)).save(picture)
    picture.write_bytes(picture.read_bytes()[:700])
    entries = {"p0": {"caption": "a", "train_resolution": [1, 1], "image_size": [1, 1]}, "p6.jpg": {"tags": "b"}}
    (images.parent / "in.json").write_text(json.dumps(entries), encoding="utf-8")
    lines, entries = prepare(images, capsys)
    assert lines[-3] == "2 images cannot be used (named above); they have no train_resolution"
    assert entries["p0"] == {"caption": "a"} and entries["p6.jpg"] == {"tags": "b"}
    assert entries["p6"]["image_size"] == [150, 60] and len(entries) == NUM + 1
    assert "p6.jpg" in caplog.text and "p0.png" in caplog.text


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--recursive"], "--recursive needs --full_path"),
        (["--v2"], "v2 is for Stable Diffusion 2"),
        (["--max_resolution", "256,256"], "a side above max_bucket_reso 128"),
        (["--max_resolution", "wide"], "is not a resolution"),
        (["--bucket_reso_steps", "40"], "bucket_reso_steps 40 is not a multiple of 32"),
        (["--batch_size", "0"], "vae_batch_size = 0 must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(images, capsys, flags, what):
    assert prepare_buckets_latents.main(arguments(images, *flags)) == 2
    assert what in capsys.readouterr().err
    assert not (images.parent / "out.json").exists() and not list(images.glob("*.npz"))


def test_missing_files_are_sentences(images, capsys):
    assert prepare_buckets_latents.main(arguments(images, out="nowhere/out.json")) == 2
    assert "out_json" in capsys.readouterr().err
    (images.parent / "in.json").unlink()
    assert prepare_buckets_latents.main(arguments(images)) == 2
    assert "in_json" in capsys.readouterr().err

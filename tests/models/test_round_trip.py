"""Single file, diffusers folder and back: every tensor identical, and diffusers reads what is written."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.io.safetensors_file import read_header
from library.models import checkpoint
from library.models.bundle import ModelBundle
from library.models.diffusers_folder import FOLDERS
from library.models.families import sdxl

LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"


def _assert_same_file(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    assert [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])] == []


@pytest.fixture(scope="module")
def with_logit_scale(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's file with the logit scale that full-size files have."""
    path = tmp_path_factory.mktemp("logit") / "model.safetensors"
    with safe_open(tiny_path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(tiny_path), LOGIT_SCALE: torch.tensor(4.6055, dtype=torch.float16)}, path, metadata=metadata)
    return path


def test_single_file_to_bundle_to_single_file_is_identical(with_logit_scale: Path, tmp_path: Path):
    loaded = checkpoint.load_bundle(str(with_logit_scale), dtype=torch.float16)
    checkpoint.save_single_file(loaded, tmp_path / "again.safetensors", dtype=torch.float16)
    _assert_same_file(with_logit_scale, tmp_path / "again.safetensors")


def test_single_file_to_folder_to_single_file_is_identical(with_logit_scale: Path, tmp_path: Path):
    loaded = checkpoint.load_bundle(str(with_logit_scale), dtype=torch.float16)
    checkpoint.save_diffusers(loaded, tmp_path / "folder")
    from_folder = checkpoint.load_bundle(str(tmp_path / "folder"), dtype=torch.float16)
    checkpoint.save_single_file(from_folder, tmp_path / "again.safetensors")
    _assert_same_file(with_logit_scale, tmp_path / "again.safetensors")
    assert from_folder.arch == loaded.arch


def test_casting_happens_on_the_way_to_the_file(bundle: ModelBundle, tiny_path: Path, tmp_path: Path):
    checkpoint.save_single_file(bundle, tmp_path / "half.safetensors", dtype=torch.float16)
    _assert_same_file(tiny_path, tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in bundle.unet.parameters()} == {torch.float32}


def test_the_header_tells_a_reader_what_shapes_cannot(bundle: ModelBundle, tmp_path: Path):
    checkpoint.save_single_file(bundle, tmp_path / "m.safetensors", metadata={"modelspec.title": "mine"})
    metadata, tensors = read_header(tmp_path / "m.safetensors")
    assert metadata["arch.norm_groups"] == "8" and metadata["arch.head_dim"] == "16"
    assert metadata["modelspec.title"] == "mine"
    assert len(tensors) == 973 - 3 * 2 * 2  # per layer of encoder 2, three weights and three biases are one each


def test_a_velocity_model_says_so_in_both_layouts(fresh_bundle: ModelBundle, tmp_path: Path):
    fresh_bundle.prediction_type = "v_prediction"
    sdxl.save(fresh_bundle, tmp_path / "v.safetensors", dtype=torch.float16)
    sdxl.save(fresh_bundle, tmp_path / "v", save_as="diffusers", dtype=torch.float16)
    assert sdxl.load(str(tmp_path / "v.safetensors"), parts=("vae",)).prediction_type == "v_prediction"
    assert sdxl.load(str(tmp_path / "v"), parts=("vae",)).prediction_type == "v_prediction"
    config = json.loads((tmp_path / "v" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"


def test_a_saved_folder_replaces_an_older_one_whole(fresh_bundle: ModelBundle, tmp_path: Path):
    (tmp_path / "m" / "unet").mkdir(parents=True)
    (tmp_path / "m" / "unet" / "stale.bin").write_bytes(b"old")
    checkpoint.save_diffusers(fresh_bundle, tmp_path / "m", dtype=torch.float16)
    assert not (tmp_path / "m" / "unet" / "stale.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """The folder as diffusers itself loads it, float32."""
    return StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def test_diffusers_loads_the_folder_with_the_same_weights(pipeline: StableDiffusionXLPipeline, bundle: ModelBundle):
    for part, name in FOLDERS.items():
        ours, other = getattr(bundle, part).state_dict(), getattr(pipeline, name).state_dict()
        assert ours.keys() == other.keys()
        assert [key for key in ours if not torch.equal(ours[key], other[key])] == [], part
    assert pipeline.vae.config.scaling_factor == bundle.scaling_factor == 0.13025
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler"


@pytest.mark.parametrize("prompt", ["a red circle", "", "a photo of a cat, best quality", "word " * 90])
def test_diffusers_encodes_prompts_as_we_do(pipeline: StableDiffusionXLPipeline, bundle: ModelBundle, prompt: str):
    theirs, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    ours = sdxl.encode_text(bundle.text_encoder_1, bundle.text_encoder_2, sdxl.tokenize(bundle.tokenizer, [prompt]))
    torch.testing.assert_close(ours.hidden_BTD, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pooled_BP, pooled, rtol=1e-5, atol=1e-5)
    generated = sdxl.encode_text_gen(bundle.text_encoder_1, bundle.text_encoder_2, bundle.tokenizer, [prompt])
    torch.testing.assert_close(generated.hidden_BTD, theirs, rtol=1e-5, atol=1e-5)


def test_diffusers_predicts_as_we_do(pipeline: StableDiffusionXLPipeline, bundle: ModelBundle):
    text = sdxl.encode_text(
        bundle.text_encoder_1, bundle.text_encoder_2, sdxl.tokenize(bundle.tokenizer, ["a blue star"])
    )
    x, t = torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(0)), torch.tensor([601])
    ids = pipeline._get_add_time_ids((96, 160), (3, 5), (128, 64), torch.float32, text_encoder_projection_dim=48)
    added = {"text_embeds": text.pooled_BP, "time_ids": ids}
    theirs = pipeline.unet(x, t, encoder_hidden_states=text.hidden_BTD, added_cond_kwargs=added).sample
    ours = sdxl.predict(bundle.unet, x, t, text, torch.tensor([[96, 160, 3, 5, 128, 64]]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    swapped = sdxl.predict(bundle.unet, x, t, text, torch.tensor([[160, 96, 3, 5, 128, 64]]))
    assert (swapped - theirs).abs().max() > 1e-4


def test_diffusers_reads_the_single_file_with_our_folder_as_configuration(
    tiny_path: Path, folder: Path, half_bundle: ModelBundle
):
    theirs = StableDiffusionXLPipeline.from_single_file(
        str(tiny_path), config=str(folder), local_files_only=True, dtype=torch.float16
    )
    for part, name in FOLDERS.items():
        ours, other = getattr(half_bundle, part).state_dict(), getattr(theirs, name).state_dict()
        assert ours.keys() == other.keys()
        assert [key for key in ours if not torch.equal(ours[key], other[key])] == [], part


def test_the_folder_has_the_tokenizer_files_that_older_versions_read(folder: Path):
    for name in ("tokenizer", "tokenizer_2"):
        vocabulary = json.loads((folder / name / "vocab.json").read_text(encoding="utf-8"))
        assert len(vocabulary) == 49408 and vocabulary["cat</w>"] == 2368
        merges = (folder / name / "merges.txt").read_text(encoding="utf-8").splitlines()
        assert merges[0] == "#version: 0.2" and len(merges) == 48895
    assert json.loads((folder / "tokenizer_2" / "tokenizer_config.json").read_text())["pad_token"] == "!"


def test_text_encoder_1_is_written_with_the_names_every_version_reads(folder: Path):
    keys = load_file(folder / "text_encoder" / "model.safetensors").keys()
    assert all(key.startswith("text_model.") for key in keys)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    assert config["architectures"] == ["CLIPTextModel"] and config["eos_token_id"] == 49407

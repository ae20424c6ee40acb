"""Files that are not what they should be: the sentence says what they are and what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.models import checkpoint

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TE1, TE2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def write(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Write the tiny model's file after `change` had its way with the tensors."""
    with safe_open(tiny_path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tiny_path)
    number = iter(range(1000))

    def write(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
        path = tmp_path_factory.getbasetemp() / f"bad{next(number)}.safetensors"
        save_file(change(dict(tensors)), path, metadata=metadata)
        return str(path)

    return write


def _without(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}


def _only(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: torch.zeros(2, 2) for name in names}


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        (_without(VAE), "no VAE inside", "--vae"),
        (_without(UNET), "no U-Net inside", "complete SDXL checkpoint"),
        (_without(TE1), "no text encoder 1 inside", "complete SDXL checkpoint"),
        (_without(TE2), "no text encoder 2 inside", "complete SDXL checkpoint"),
        (_without(UNET + "output_blocks.8."), "U-Net is not complete SDXL: of its 620 tensors, 12 missing", "again"),
        (_without(TE2 + "transformer.resblocks.1."), "text encoder 2 is not complete SDXL", "again"),
        (_only("cond_stage_model.transformer.text_model.x", UNET + "x"), "Stable Diffusion 1.x", "SDXL checkpoint"),
        (_only("cond_stage_model.model.x", UNET + "x"), "Stable Diffusion 2.x", "SDXL checkpoint"),
        (_only("conditioner.embedders.0.model.x", UNET + "x"), "SDXL refiner", "base model"),
        (_only("lora_unet_input_blocks_4_1_proj_in.lora_down.weight"), "LoRA", "--network_weights"),
        (_only("unet.down_blocks.1.attentions.0.proj_in.lora_A.weight"), "LoRA", "--network_weights"),
        (_only("lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"), "another adapter", "--network_weights"),
        (_only("clip_l", "clip_g"), "textual inversion", "SDXL checkpoint"),
        (_only("control_model.input_hint_block.0.weight"), "ControlNet", "SDXL checkpoint"),
        (_only("lllite_unet_input_blocks_4_1.conditioning1.0.weight"), "LLLite", "checkpoint it was trained on"),
        (_only("model.diffusion_model.joint_blocks.0.x_block.weight"), "Stable Diffusion 3", "SDXL checkpoint"),
        (_only("double_blocks.0.img_attn.qkv.weight"), "Flux", "SDXL checkpoint"),
        (_only("decoder.conv_in.weight"), "VAE only", "--vae"),
        (_only(VAE + "decoder.conv_in.weight"), "VAE only", "--vae"),
        (_only("down_blocks.0.resnets.0.conv1.weight"), "one part of a diffusers folder", "model_index.json"),
        (_only("something.weight"), "not an SDXL checkpoint", "tiny"),
        (_only(UNET + "something.weight"), "structure of an SDXL model", "SDXL checkpoint"),
    ],
)
def test_what_the_file_is_and_the_way_out(write, change, what: str, fix: str):
    path = write(change)
    with pytest.raises(UserError) as caught:
        checkpoint.load_bundle(path)
    problem = caught.value.problems[0]
    assert what in problem.what and fix in problem.fix and problem.where == path


def test_an_inpainting_model_is_recognised(write):
    def nine_channels(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[UNET + "input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
        return tensors

    with pytest.raises(UserError, match=r"an inpainting model.*takes 9 channels"):
        checkpoint.load_bundle(write(nine_channels))


def test_unexpected_and_misshapen_tensors_are_counted_and_named(write):
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[VAE + "decoder.extra.weight"] = torch.zeros(1)
        tensors[VAE + "decoder.conv_out.bias"] = torch.zeros(7)
        return tensors

    with pytest.raises(UserError) as caught:
        checkpoint.load_bundle(write(change), parts=("vae",))
    assert "1 unexpected (first_stage_model.decoder.extra.weight)" in str(caught.value)
    assert "1 of another shape (first_stage_model.decoder.conv_out.bias)" in str(caught.value)


def test_a_quantised_file_is_explained(write):
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[UNET + "time_embed.0.weight"] = tensors[UNET + "time_embed.0.weight"].to(torch.int8)
        return tensors

    with pytest.raises(UserError, match="quantised"):
        checkpoint.load_bundle(write(change), parts=("unet",))


def test_keys_outside_the_parts_and_old_position_numbers_are_ignored(write):
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model_ema.decay"] = torch.zeros(1)
        tensors[TE1 + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors[TE2 + "transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        return tensors

    loaded = checkpoint.load_bundle(write(change))
    assert torch.equal(loaded.text_encoder_1.embeddings.position_ids, torch.arange(77)[None])
    assert torch.equal(loaded.text_encoder_2.text_model.embeddings.position_ids, torch.arange(77)[None])


def test_playgrounds_projection_is_read_as_the_linear_layer_it_is(write, bundle):
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[TE2 + "text_projection.weight"] = tensors.pop(TE2 + "text_projection").T.contiguous()
        return tensors

    loaded = checkpoint.load_bundle(write(change), parts=("text_encoders",))
    ours = bundle.text_encoder_2.text_projection.weight
    assert torch.equal(loaded.text_encoder_2.text_projection.weight, ours)
    assert not torch.equal(ours, ours.T)


def test_a_marker_tensor_makes_it_a_velocity_model(write):
    path = write(lambda tensors: {**tensors, "v_pred": torch.zeros(0)})
    assert checkpoint.load_bundle(path, parts=("vae",)).prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", "is empty"), (b"<html>sign in</html>" * 9, "web page"), (b"version https://git-lfs.github.com/spec", "LFS")],
)
def test_broken_downloads_are_explained(tmp_path: Path, content: bytes, what: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=what):
        checkpoint.load_bundle(str(path))


def test_a_file_that_was_cut_short_is_explained(tiny_path: Path, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(tiny_path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cut short"):
        checkpoint.load_bundle(str(path))


def test_a_name_that_does_not_exist_gets_the_nearest_one(tiny_path: Path, tmp_path: Path):
    (tmp_path / "my_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"did you mean .*my_model\.safetensors"):
        checkpoint.resolve_checkpoint(str(tmp_path / "my_modle.safetensors"))
    with pytest.raises(UserError, match="give the file itself"):
        checkpoint.resolve_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match="no such VAE"):
        checkpoint.load_bundle("tiny", vae=str(tmp_path / "none.safetensors"))

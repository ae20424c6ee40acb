"""--vae in every layout in which VAEs are passed around."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models import checkpoint
from library.models.bundle import ModelBundle


@pytest.fixture(scope="module")
def other_vae(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder whose VAE differs from tiny's by one bias."""
    loaded = checkpoint.load_bundle("tiny", dtype=torch.float16)
    loaded.vae.decoder.conv_out.bias.add_(1.0)
    path = tmp_path_factory.mktemp("vae") / "other"
    checkpoint.save_diffusers(loaded, path)
    checkpoint.save_single_file(loaded, path.with_suffix(".safetensors"))
    return path


@pytest.fixture(scope="module")
def files(other_vae: Path) -> dict[str, Path]:
    """The same VAE in six forms."""
    base = other_vae.parent
    diffusers = load_file(other_vae / "vae" / "diffusion_pytorch_model.safetensors")
    whole = load_file(other_vae.with_suffix(".safetensors"))
    prefix = "first_stage_model."
    ldm = {key.removeprefix(prefix): tensor for key, tensor in whole.items() if key.startswith(prefix)}
    old = {
        key.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"): v
        for key, v in diffusers.items()
    }
    torch.save(diffusers, base / "diffusers.bin")
    torch.save({"state_dict": {**ldm, "loss.logvar": torch.zeros(1)}}, base / "ldm.pt")
    save_file(ldm, base / "ldm.safetensors")
    save_file(old, base / "old_names.safetensors")
    return {
        "folder of a VAE": other_vae / "vae",
        "folder of a model": other_vae,
        "whole checkpoint": other_vae.with_suffix(".safetensors"),
        "diffusers names, .bin": base / "diffusers.bin",
        "LDM names without prefix": base / "ldm.safetensors",
        "LDM names, .pt, with leftovers": base / "ldm.pt",
        "diffusers' old names": base / "old_names.safetensors",
    }


@pytest.mark.parametrize(
    "form",
    [
        "folder of a VAE",
        "folder of a model",
        "whole checkpoint",
        "diffusers names, .bin",
        "LDM names without prefix",
        "LDM names, .pt, with leftovers",
        "diffusers' old names",
    ],
)
def test_the_vae_is_replaced(files: dict[str, Path], bundle: ModelBundle, form: str):
    loaded = checkpoint.load_bundle("tiny", vae=str(files[form]), parts=("vae", "text_encoders"))
    assert torch.equal(loaded.vae.decoder.conv_out.bias, (bundle.vae.decoder.conv_out.bias.half() + 1).float())
    assert torch.equal(loaded.vae.decoder.conv_in.weight, bundle.vae.decoder.conv_in.weight)
    assert torch.equal(loaded.text_encoder_2.text_projection.weight, bundle.text_encoder_2.text_projection.weight)
    assert loaded.vae_id() != bundle.vae_id()
    assert loaded.vae_id() == checkpoint.load_bundle(str(files["whole checkpoint"]), parts=("vae",)).vae_id()


def test_files_without_a_usable_vae_are_named(tiny_path: Path, tmp_path: Path):
    save_file({"unet.weight": torch.zeros(1)}, tmp_path / "none.safetensors")
    save_file({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="no VAE in this file"):
        checkpoint.load_bundle("tiny", vae=str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match="not of SDXL's kind"):
        checkpoint.load_bundle("tiny", vae=str(tmp_path / "odd.safetensors"))
    with pytest.raises(UserError, match="no VAE in this folder"):
        checkpoint.load_bundle("tiny", vae=str(tmp_path))


def test_a_vae_of_other_latents_is_refused(tiny_path: Path, tmp_path: Path):
    prefix = "first_stage_model."
    tensors = {k: v for k, v in load_file(tiny_path).items() if k.startswith(prefix)}
    tensors[prefix + "post_quant_conv.weight"] = torch.zeros(16, 16, 1, 1)
    save_file(tensors, tmp_path / "sixteen.safetensors")
    with pytest.raises(UserError, match="latents of 16 channels"):
        checkpoint.load_bundle("tiny", vae=str(tmp_path / "sixteen.safetensors"))

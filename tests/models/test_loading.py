"""Loading: dtypes, parts, other containers, identities."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models import checkpoint
from library.models.arch import PARTS, PREFIXES, SdxlArch, TextArch, UnetArch, VaeArch
from library.models.assemble import empty_module, part_keymap, stored_shapes
from library.models.bundle import ModelBundle


def _equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_parameters_come_frozen_real_and_in_eval_mode(bundle: ModelBundle):
    for part in PARTS:
        module = getattr(bundle, part)
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        tensors = [*module.parameters(), *module.buffers()]
        assert all(tensor.device.type == "cpu" for tensor in tensors)
    assert bundle.text_widths == (32, 48)
    assert bundle.source == "tiny" and bundle.resolved_path.is_file()


def test_each_part_gets_its_dtype(tiny_path: Path):
    loaded = checkpoint.load_bundle(str(tiny_path), dtype=torch.bfloat16, dtypes={"vae": torch.float32})
    assert {parameter.dtype for parameter in loaded.unet.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.text_encoder_2.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.vae.parameters()} == {torch.float32}


def test_parts_that_are_not_asked_for_are_not_loaded(bundle: ModelBundle):
    loaded = checkpoint.load_bundle("tiny", parts=("text_encoders",))
    assert loaded.unet is None and loaded.vae is None
    assert _equal(loaded.text_encoder_1, bundle.text_encoder_1)
    assert loaded.vae_id() == bundle.vae_id()
    with pytest.raises(UserError, match="without its U-Net, VAE"):
        checkpoint.save_single_file(loaded, "nowhere.safetensors")


def test_no_tensor_that_needs_no_cast_is_copied(tiny_path: Path):
    """Parameters of a half-precision load are mappings of the file: none is in two places, none shares a storage."""
    loaded = checkpoint.load_bundle(str(tiny_path), dtype=torch.float16)
    storages = [
        parameter.untyped_storage().data_ptr() for part in PARTS for parameter in getattr(loaded, part).parameters()
    ]
    assert len(set(storages)) == len(storages)
    before = tiny_path.read_bytes()
    with torch.no_grad():
        loaded.unet.conv_in.weight.add_(1.0)
    assert tiny_path.read_bytes() == before


def test_reading_instead_of_mapping_gives_the_same(tiny_path: Path, half_bundle: ModelBundle):
    loaded = checkpoint.load_bundle(str(tiny_path), dtype=torch.float16, disable_mmap=True)
    assert all(_equal(getattr(loaded, part), getattr(half_bundle, part)) for part in PARTS)


@pytest.mark.parametrize("nested", [True, False])
def test_a_ckpt_gives_the_model_it_was_written_from(tmp_path: Path, nested: bool):
    """A .ckpt has no header: this narrow model has SDXL's own head width and normalisation groups."""
    arch = SdxlArch(
        unet=UnetArch(4, 4, (64, 64, 128), (0, 1, 1), 192, 128 + 6 * 32),
        text_encoder_1=TextArch(49408, 77, 64, 2, 64, None),
        text_encoder_2=TextArch(49408, 77, 128, 2, 64, 128),
        vae=VaeArch(3, 4, (32, 32, 64, 64)),
    )
    tensors = {}
    for part in PARTS:
        shapes = stored_shapes(empty_module(arch, part), part_keymap(arch, part))
        tensors |= {PREFIXES[part] + key: torch.randn(shape).half() for key, shape in shapes.items()}
    torch.save({"state_dict": tensors, "epoch": 3} if nested else tensors, tmp_path / "m.ckpt")
    loaded = checkpoint.load_bundle(str(tmp_path / "m.ckpt"), dtype=torch.float16)
    assert loaded.arch == arch
    checkpoint.save_single_file(loaded, tmp_path / "m.safetensors")
    again = load_file(tmp_path / "m.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_a_symlink_is_followed(tiny_path: Path, tmp_path: Path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(tiny_path)
    assert checkpoint.resolve_checkpoint(str(link)) == tiny_path.resolve()


def test_identities_are_those_of_the_weights_not_of_the_file(bundle: ModelBundle, folder: Path, tiny_path: Path):
    from_folder = checkpoint.load_bundle(str(folder), parts=("vae",))
    assert from_folder.vae_id() == bundle.vae_id()
    assert from_folder.text_encoder_id() == bundle.text_encoder_id()
    assert bundle.vae_id() != bundle.text_encoder_id()


def test_a_sharded_folder_is_read_whole(folder: Path, tmp_path: Path, half_bundle: ModelBundle):
    """Two files with the names that the libraries give shards."""
    target = tmp_path / "sharded"
    (target / "unet").mkdir(parents=True)
    for name in ("model_index.json", "text_encoder", "text_encoder_2", "vae", "scheduler"):
        (target / name).symlink_to(folder / name)
    (target / "unet" / "config.json").symlink_to(folder / "unet" / "config.json")
    tensors = list(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items())
    save_file(dict(tensors[:300]), target / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file(dict(tensors[300:]), target / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors")
    loaded = checkpoint.load_bundle(str(target), dtype=torch.float16, parts=("unet",))
    assert _equal(loaded.unet, half_bundle.unet)
    (target / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="of its 620 tensors, 320 missing"):
        checkpoint.load_bundle(str(target), parts=("unet",))


def test_a_folder_without_weights_or_configuration_is_explained(folder: Path, tmp_path: Path):
    target = tmp_path / "m"
    (target / "unet").mkdir(parents=True)
    (target / "model_index.json").symlink_to(folder / "model_index.json")
    with pytest.raises(UserError, match="configuration cannot be read"):
        checkpoint.load_bundle(str(target))
    (target / "unet" / "config.json").symlink_to(folder / "unet" / "config.json")
    for name in ("text_encoder", "text_encoder_2"):
        (target / name).symlink_to(folder / name)
    with pytest.raises(UserError, match="no weights of the U-Net"):
        checkpoint.load_bundle(str(target), parts=("unet",))
    with pytest.raises(UserError, match="no VAE inside"):
        checkpoint.load_bundle(str(target), parts=("vae",))


def test_metadata_of_the_file_is_kept(bundle: ModelBundle, tiny_path: Path):
    with safe_open(tiny_path, "pt") as file:
        assert bundle.metadata == file.metadata()

"""Names: the full-size layout against the published numbers, both directions, and diffusers' converters as judge."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils as oracle
from safetensors.torch import load_file

from library.config.block_weights import u_net_block
from library.models.arch import PARTS, PREFIXES, SDXL, Part, arch_from_tensors
from library.models.assemble import empty_module, part_keymap, stored_shapes
from library.models.bundle import ModelBundle
from library.models.keymaps.text import with_text_model
from library.models.keymaps.unet import diffusers_to_sai, sai_to_diffusers
from library.models.keymaps.vae import modern_key

# tensors and parameters of the 23 U-Net blocks; source: spec block_lr.md §1
BLOCKS = [
    (8, 7_296_000), (2, 11_840), (10, 2_255_040), (10, 2_255_040), (2, 921_920), (58, 27_390_080), (56, 29_028_480),
    (2, 3_687_040), (218, 375_425_280), (216, 381_978_880), (10, 31_138_560), (206, 350_840_320), (10, 31_138_560),
    (218, 400_005_120), (218, 400_005_120), (220, 406_558_720), (58, 37_633_280), (58, 33_536_000), (60, 35_174_400),
    (12, 4_407_040), (12, 3_382_400), (12, 3_382_400), (4, 12_164),
]  # fmt: skip


@pytest.fixture(scope="module")
def full_size() -> dict[Part, dict[str, tuple[int, ...]]]:
    """Names (without prefix) and shapes of a full SDXL's single file, from modules on the meta device."""
    return {part: stored_shapes(empty_module(SDXL, part), part_keymap(SDXL, part)) for part in PARTS}


def test_full_size_has_2514_tensors_with_the_logit_scale(full_size):
    assert {part: len(shapes) for part, shapes in full_size.items()} == {
        "unet": 1680,
        "text_encoder_1": 196,
        "text_encoder_2": 389,
        "vae": 248,
    }


def test_full_size_blocks_have_the_published_tensors_and_parameters(full_size):
    tensors, parameters = Counter(), Counter()
    for key, shape in full_size["unet"].items():
        tensors[u_net_block(key)] += 1
        parameters[u_net_block(key)] += math.prod(shape)
    assert [(tensors[index], parameters[index]) for index in range(23)] == BLOCKS


@pytest.mark.parametrize(
    ("part", "count"), [("text_encoder_1", 123_060_480), ("text_encoder_2", 694_659_840), ("vae", 83_653_863)]
)
def test_full_size_parameter_counts(full_size, part, count):
    assert sum(math.prod(shape) for shape in full_size[part].values()) == count


@pytest.mark.parametrize(
    ("part", "key", "shape"),
    [
        ("unet", "input_blocks.0.0.weight", (320, 4, 3, 3)),
        ("unet", "input_blocks.3.0.op.weight", (320, 320, 3, 3)),
        ("unet", "input_blocks.7.1.transformer_blocks.9.attn2.to_k.weight", (1280, 2048)),
        ("unet", "input_blocks.4.1.proj_in.weight", (640, 640)),
        ("unet", "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight", (10240, 1280)),
        ("unet", "output_blocks.2.2.conv.weight", (1280, 1280, 3, 3)),
        ("unet", "output_blocks.8.0.skip_connection.weight", (320, 640, 1, 1)),
        ("unet", "label_emb.0.0.weight", (1280, 2816)),
        ("text_encoder_1", "text_model.encoder.layers.11.mlp.fc1.weight", (3072, 768)),
        ("text_encoder_2", "transformer.resblocks.31.attn.in_proj_weight", (3840, 1280)),
        ("text_encoder_2", "transformer.resblocks.0.attn.in_proj_bias", (3840,)),
        ("text_encoder_2", "positional_embedding", (77, 1280)),
        ("text_encoder_2", "text_projection", (1280, 1280)),
        ("vae", "decoder.up.3.upsample.conv.weight", (512, 512, 3, 3)),
        ("vae", "decoder.up.0.block.0.nin_shortcut.weight", (128, 256, 1, 1)),
        ("vae", "encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        ("vae", "quant_conv.weight", (8, 8, 1, 1)),
    ],
)
def test_full_size_shapes(full_size, part, key, shape):
    assert full_size[part][key] == shape


def test_the_architecture_is_read_back_from_the_full_size_shapes(full_size):
    shapes = {PREFIXES[part] + key: shape for part in PARTS for key, shape in full_size[part].items()}
    assert arch_from_tensors(shapes, {}) == SDXL


def test_unet_names_translate_there_and_back(full_size):
    ours = [sai_to_diffusers(key) for key in full_size["unet"]]
    assert len(set(ours)) == 1680
    assert [diffusers_to_sai(name) for name in ours] == list(full_size["unet"])


@pytest.mark.parametrize(
    ("diffusers", "sai", "block"),
    [
        ("time_embedding.linear_2", "time_embed.2", 0),
        ("add_embedding.linear_1", "label_emb.0.0", 0),
        ("conv_in", "input_blocks.0.0", 1),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op", 4),
        ("down_blocks.1.attentions.1.norm", "input_blocks.5.1.norm", 6),
        ("down_blocks.2.resnets.1.conv1", "input_blocks.8.0.in_layers.2", 9),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1", 12),
        ("mid_block.attentions.0.proj_out", "middle_block.1.proj_out", 11),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv", 15),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection", 21),
        ("conv_norm_out", "out.0", 22),
    ],
)  # fmt: skip
def test_module_paths_for_lora_names(diffusers, sai, block):
    assert diffusers_to_sai(diffusers) == sai
    assert sai_to_diffusers(sai) == diffusers
    assert u_net_block(sai) == block
    assert u_net_block(sai.replace(".", "_")) == block


@pytest.mark.parametrize("name", ["", "text_model.encoder", "down_blocks", "conv_input", "input_blocks", "outer.0"])
def test_names_that_are_not_of_the_unet_are_refused(name):
    for function in (diffusers_to_sai, sai_to_diffusers, u_net_block):
        with pytest.raises(KeyError):
            function(name)


def test_text_encoder_paths_get_their_prefix_once():
    assert with_text_model("encoder.layers.0.mlp.fc1") == "text_model.encoder.layers.0.mlp.fc1"
    assert with_text_model("text_model.encoder.layers.0") == "text_model.encoder.layers.0"
    assert with_text_model("text_projection") == "text_projection"


def test_old_vae_attention_names_become_todays():
    assert modern_key("encoder.mid_block.attentions.0.proj_attn.bias") == "encoder.mid_block.attentions.0.to_out.0.bias"
    assert modern_key("encoder.mid_block.attentions.0.query.weight") == "encoder.mid_block.attentions.0.to_q.weight"
    assert (
        modern_key("encoder.mid_block.attentions.0.group_norm.bias") == "encoder.mid_block.attentions.0.group_norm.bias"
    )
    assert modern_key("decoder.conv_in.weight") == "decoder.conv_in.weight"


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    theirs = {key: tensor for key, tensor in theirs.items() if not key.endswith("position_ids")}
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert different == []


def test_unet_and_vae_convert_as_diffusers_converts_them(half_bundle: ModelBundle, tiny_path: Path):
    file = load_file(tiny_path)
    _same(half_bundle.unet.state_dict(), oracle.convert_ldm_unet_checkpoint(dict(file), half_bundle.unet.config))
    _same(half_bundle.vae.state_dict(), oracle.convert_ldm_vae_checkpoint(dict(file), half_bundle.vae.config))


def test_text_encoders_convert_as_diffusers_converts_them(half_bundle: ModelBundle, tiny_path: Path):
    file = load_file(tiny_path)
    prefix = "conditioner.embedders.0.transformer.text_model."
    clip_l = oracle.convert_ldm_clip_checkpoint(dict(file), remove_prefix=prefix)
    _same(half_bundle.text_encoder_1.state_dict(), {k.removeprefix("text_model."): v for k, v in clip_l.items()})
    encoder = half_bundle.text_encoder_2
    big_g = oracle.convert_open_clip_checkpoint(encoder, dict(file), prefix="conditioner.embedders.1.model.")
    _same(encoder.state_dict(), big_g)

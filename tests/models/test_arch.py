"""What shapes and header metadata say about a model, and what is said when they do not fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from library.errors import UserError
from library.models.arch import (
    PARTS,
    SDXL,
    Facts,
    SdxlArch,
    TextArch,
    UnetArch,
    VaeArch,
    arch_from_tensors,
    facts_from_metadata,
    facts_metadata,
)
from library.models.assemble import empty_module
from library.models.configs import arch_from_configs, part_config
from library.models.tensors import shapes_of

TINY = SdxlArch(
    unet=UnetArch(4, 4, (32, 64, 80), (0, 1, 2), 80, 240),
    text_encoder_1=TextArch(49408, 77, 32, 3, 128, None),
    text_encoder_2=TextArch(49408, 77, 48, 3, 192, 48),
    vae=VaeArch(3, 4, (16, 32, 48, 48)),
    facts=Facts(norm_groups=8, vae_norm_groups=8, head_dim=16, sample_size=16),
)


@pytest.fixture(scope="module")
def tiny_header(tiny_path: Path):
    from library.io.safetensors_file import TensorReader

    with TensorReader(tiny_path) as reader:
        return shapes_of(reader), reader.metadata


def test_tiny_is_read_from_its_header(tiny_header):
    assert arch_from_tensors(*tiny_header) == TINY


@pytest.mark.parametrize("arch", [SDXL, TINY], ids=["sdxl", "tiny"])
def test_configurations_describe_the_architecture_they_were_made_from(arch):
    assert arch_from_configs({part: part_config(arch, part) for part in PARTS}) == arch


def test_the_full_unet_configuration_is_the_published_one():
    config = empty_module(SDXL, "unet").config
    assert config.attention_head_dim == [5, 10, 20]
    assert config.transformer_layers_per_block == [1, 2, 10]
    assert config.addition_time_embed_dim == 256 and config.projection_class_embeddings_input_dim == 2816
    assert config.down_block_types == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert config.norm_num_groups == 32 and config.sample_size == 128


def test_both_text_encoders_pool_at_the_real_end_token():
    for part in ("text_encoder_1", "text_encoder_2"):
        assert empty_module(SDXL, part).config.eos_token_id == 49407
    assert part_config(SDXL, "text_encoder_1")["pad_token_id"] == 49407
    assert part_config(SDXL, "text_encoder_2")["pad_token_id"] == 0


def test_facts_that_are_sdxls_own_are_not_written():
    assert facts_metadata(SDXL.facts) == {}
    assert facts_from_metadata(facts_metadata(TINY.facts)) == TINY.facts
    assert facts_metadata(replace(Facts(), head_dim=16)) == {"arch.head_dim": "16"}


@pytest.mark.parametrize("value", ["eight", "0", "-8", "8.0", ""])
def test_facts_that_are_no_numbers_are_named(value):
    with pytest.raises(UserError, match=r"arch\.norm_groups"):
        facts_from_metadata({"arch.norm_groups": value})


def test_a_narrow_model_without_its_metadata_is_explained(tiny_header):
    with pytest.raises(UserError, match=r"(?s)do not divide.*metadata"):
        arch_from_tensors(tiny_header[0], {})


def test_a_folder_of_another_architecture_is_explained():
    config = part_config(SDXL, "unet") | {"addition_embed_type": None}
    with pytest.raises(UserError, match="takes no size ids"):
        arch_from_configs({"unet": config})
    del config["block_out_channels"]
    with pytest.raises(UserError, match="not that of an SDXL model"):
        arch_from_configs({"unet": config | {"addition_embed_type": "text_time"}})

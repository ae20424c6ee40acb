"""Which modules a LoRA sits on, and what they are called, on the full-size architecture without memory."""

from collections import Counter

import pytest
from torch import nn

from library.models.kohya_view import text_encoder_view, unet_view
from networks import lora


@pytest.fixture(scope="module")
def full_network(full_roots):
    return lora.create(full_roots, dim=4, alpha=1)


@pytest.fixture(scope="module")
def full_network_with_conv(full_roots):
    return lora.create(full_roots, dim=4, alpha=1, args={"conv_dim": "2", "conv_alpha": "0.5"})


def expected_attention_names() -> set[str]:
    """The 722 names of lora_format.md §1, from the block table of SDXL."""
    depths = {f"input_blocks_{i}_1": 2 if i < 6 else 10 for i in (4, 5, 7, 8)} | {"middle_block_1": 10}
    depths |= {f"output_blocks_{i}_1": 10 if i < 3 else 2 for i in range(6)}
    names = set()
    for block, depth in depths.items():
        names |= {f"lora_unet_{block}_proj_in", f"lora_unet_{block}_proj_out"}
        for layer in range(depth):
            start = f"lora_unet_{block}_transformer_blocks_{layer}"
            attention = [f"attn{n}_{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out_0")]
            names |= {f"{start}_{tail}" for tail in [*attention, "ff_net_0_proj", "ff_net_2"]}
    return names


def expected_conv_names() -> set[str]:
    """The 66 more that conv_dim adds: 17 ResNets (11 of them with a 1x1 shortcut), 2 down- and 2 upsamplers."""
    blocks = [f"input_blocks_{i}_0" for i in (1, 2, 4, 5, 7, 8)] + ["middle_block_0", "middle_block_2"]
    blocks += [f"output_blocks_{i}_0" for i in range(9)]
    shortcuts = ["input_blocks_4_0", "input_blocks_7_0"] + [f"output_blocks_{i}_0" for i in range(9)]
    names = {f"{b}_{tail}" for b in blocks for tail in ("in_layers_2", "out_layers_3", "emb_layers_1")}
    names |= {f"{b}_skip_connection" for b in shortcuts}
    names |= {"input_blocks_3_0_op", "input_blocks_6_0_op", "output_blocks_2_2_conv", "output_blocks_5_2_conv"}
    return {f"lora_unet_{name}" for name in names}


def expected_text_names() -> set[str]:
    tails = [f"self_attn_{p}_proj" for p in "qkv"] + ["self_attn_out_proj", "mlp_fc1", "mlp_fc2"]
    counts = {"lora_te1": 12, "lora_te2": 32}
    return {
        f"{prefix}_text_model_encoder_layers_{layer}_{tail}"
        for prefix, layers in counts.items()
        for layer in range(layers)
        for tail in tails
    }


def test_full_size_lora_has_722_unet_and_72_and_192_text_modules(full_network):
    assert [full_network.count(part) for part in ("unet", "te1", "te2")] == [722, 72, 192]
    assert set(full_network.adapters) == expected_attention_names() | expected_text_names()


def walked(prefix: str, model: nn.Module, classes: set[str]) -> list[str]:
    """The names that an sd-scripts network module makes: it knows parents by their class's name, layers by theirs."""
    names = []
    for path, parent in model.named_modules():
        if type(parent).__name__ in classes:
            for below, layer in parent.named_modules():
                if type(layer).__name__ in ("Linear", "Conv2d"):
                    names.append(f"{prefix}.{path}.{below}".replace(".", "_"))
    return names


def test_a_third_party_module_finds_sd_scripts_modules_under_sd_scripts_names(full_roots):
    te1, te2, unet = (root.module for root in full_roots)
    view, plain = unet_view(unet), {"Transformer2DModel"}
    assert sorted(walked("lora_unet", view, plain)) == sorted(expected_attention_names())
    wide = plain | {"ResnetBlock2D", "Downsample2D", "Upsample2D"}
    assert sorted(walked("lora_unet", view, wide)) == sorted(expected_attention_names() | expected_conv_names())
    text = {"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"}
    names = [
        name for number, te in ((1, te1), (2, te2)) for name in walked(f"lora_te{number}", text_encoder_view(te), text)
    ]
    assert sorted(names) == sorted(expected_text_names()) and len(names) == 72 + 192
    assert len(walked("oft_unet", view, {"CrossAttention"})) == 560
    inner = {path for path, layer in view.named_modules() if type(layer).__name__ == "BasicTransformerBlock"}
    assert len(inner) == 70 and "middle_block.1.transformer_blocks.9" in inner


def test_conv_dim_makes_788_unet_modules_named_as_sd_scripts_names_them(full_network_with_conv):
    assert full_network_with_conv.count("unet") == 788
    names = expected_attention_names() | expected_conv_names() | expected_text_names()
    assert set(full_network_with_conv.adapters) == names


def test_a_plain_network_after_one_with_conv_is_plain(full_roots, full_network_with_conv):
    assert lora.create(full_roots, dim=4, alpha=1).count("unet") == 722


def test_spatial_convs_use_conv_dim_and_everything_else_network_dim(full_network_with_conv):
    for name, adapter in full_network_with_conv.adapters.items():
        spatial = name.endswith(("in_layers_2", "out_layers_3", "_op", "_2_conv"))
        assert adapter.rank == (2 if spatial else 4), name
        assert adapter.scale == 0.25, name


def test_shapes_on_the_full_model_are_those_of_the_format(full_network_with_conv):
    tensors = {n: tuple(v.shape) for n, v in full_network_with_conv.state_dict().items()}
    start = "adapters.lora_unet_input_blocks_3_0_op."
    assert tensors[start + "lora_down.weight"] == (2, 320, 3, 3)
    assert tensors[start + "lora_up.weight"] == (320, 2, 1, 1)
    start = "adapters.lora_unet_output_blocks_0_0_skip_connection."
    assert tensors[start + "lora_down.weight"] == (4, 2560, 1, 1)
    start = "adapters.lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k."
    assert tensors[start + "lora_down.weight"] == (4, 2048)
    assert tensors[start + "lora_up.weight"] == (640, 4)
    assert tensors[start + "alpha"] == ()


def test_blocks_hold_the_numbers_of_modules_of_the_block_table(full_network):
    """block_lr.md §2: 22 modules in the blocks of depth 2, 102 in those of depth 10."""
    counts = Counter(name.split("_1_")[0] for name in full_network.adapters if name.startswith("lora_unet"))
    assert sorted(counts.values()) == [22] * 5 + [102] * 6


def test_the_last_layer_of_the_first_text_encoder_is_in_the_file_but_not_trained(full_network):
    frozen = {name for name, a in full_network.adapters.items() if not any(p.requires_grad for p in a.parameters())}
    assert len(frozen) == 6
    assert all(name.startswith("lora_te1_text_model_encoder_layers_11_") for name in frozen)

"""Sizes and learning rates per block, LoRA+ and rules by name, on the full-size architecture without memory."""

import math
from collections import Counter

import pytest

from library.errors import UserError
from networks import dora, dylora, lora, lora_fa, oft
from networks._args import lora_args, problems_of
from networks._blocks import block_index
from networks._keys import default_targets


@pytest.fixture(scope="module")
def unet_root(full_roots):
    return full_roots[2:]


def listed(default, **changes):
    values = [default] * 23
    for index, value in changes.items():
        values[int(index.removeprefix("b"))] = value
    return ",".join(map(str, values))


COUNTS = {5: 22, 6: 22, 8: 102, 9: 102, 11: 102, 13: 102, 14: 102, 15: 102, 16: 22, 17: 22, 18: 22}


def test_every_module_is_in_the_block_of_the_table(unet_root):
    plain, wide = ([t.name for t in default_targets(unet_root, with_conv=conv)] for conv in (False, True))
    assert Counter(map(block_index, plain)) == COUNTS
    assert set(map(block_index, wide)) == set(range(2, 22))
    assert block_index("lora_unet_time_embed_0") == block_index("oft_unet_label_emb_0_0") == 0
    assert block_index("lora_unet_out_2") == 22 and block_index("lora_te1_text_model_encoder_layers_0_mlp_fc1") is None


@pytest.mark.parametrize(("module", "alpha"), [(dora, 1.0), (dylora, 1.0), (lora_fa, 1.0)])
def test_the_kinds_have_the_modules_of_a_lora_with_unique_names(full_roots, module, alpha):
    plain = module.create(full_roots, dim=4, alpha=alpha, args={"conv_dim": "4"})
    assert [plain.count(part) for part in ("unet", "te1", "te2")] == [722 + 66, 72, 192]
    assert len(plain.adapters) == 986 + 66
    assert set(plain.adapters) == {target.name for target in default_targets(full_roots, with_conv=True)}
    # These names are in ComfyUI's table (test_convert_lora.py); so must be what follows them (comfy/weight_adapter).
    tails = {key.removeprefix("adapters.").partition(".")[2] for key in plain.state_dict()}
    assert tails <= {"lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale"}


def test_shapes_of_dora_magnitudes_on_the_full_model(unet_root):
    tensors = dora.create(unet_root, dim=4, alpha=1, args={"conv_dim": "4"}).state_dict()
    start = "adapters.lora_unet_input_blocks_"
    assert tensors[f"{start}4_1_transformer_blocks_0_attn2_to_k.dora_scale"].shape == (640, 1)
    assert tensors[f"{start}3_0_op.dora_scale"].shape == (320, 1, 1, 1)
    tensors = dora.create(unet_root, dim=4, alpha=1, args={"wd_on_output": "false"}).state_dict()
    assert tensors[f"{start}4_1_transformer_blocks_0_attn2_to_k.dora_scale"].shape == (1, 2048)


@pytest.mark.parametrize(
    ("args", "count"),
    [
        ({}, 560),
        ({"enable_all_linear": "False"}, 560),
        ({"enable_all_linear": "true"}, 722),
        ({"enable_conv": "1"}, 788),
    ],
)
def test_oft_has_560_722_or_788_modules_of_the_unet(full_roots, args, count):
    network = oft.create(full_roots, dim=4, alpha=1e-3, args=args)
    assert len(network.adapters) == network.count("unet") == count
    assert all(name.startswith("oft_unet_") for name in network.adapters)
    # ComfyUI has no name with oft_unet_, as sd-scripts writes it; docs/adapters.md says so.
    assert {key.rpartition(".")[2] for key in network.state_dict()} == {"oft_blocks", "alpha"}
    blocks = network.state_dict()["adapters.oft_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.oft_blocks"]
    assert blocks.shape == (4, 160, 160)
    with pytest.raises(UserError, match="640 outputs, which 7 blocks do not divide"):
        oft.create(full_roots, dim=7, alpha=1e-3)


def test_block_dims_and_alphas_size_the_unet_only(full_roots):
    args = {"block_dims": listed(2, b5=0, b11=8), "conv_block_dims": listed(3, b2=0), "conv_block_alphas": listed(1.5)}
    network = lora.create(full_roots, dim=16, alpha=4.0, args=args)
    found = {name: (a.rank, round(a.scale * a.rank, 6)) for name, a in network.adapters.items()}
    sizes = {}
    for name, size in found.items():
        sizes.setdefault(block_index(name), Counter())[size] += 1
    assert sizes[None] == {(16, 4.0): 264}
    assert set(sizes[11]) == {(8, 4.0)} and sizes[11].total() == 102
    assert set(sizes[5]) == {(3, 1.5)} and sizes[5].total() == 2  # two 3x3 convolutions; linears and 1x1 are off
    assert set(sizes[2]) == {(2, 4.0)} and sizes[2].total() == 1  # only the time embedding
    assert found["lora_unet_input_blocks_3_0_op"] == (3, 1.5)


def test_conv_dim_fills_in_for_conv_block_dims(unet_root):
    args = {"conv_dim": "2", "conv_alpha": "0.5", "block_alphas": listed(3.0)}
    network = lora.create(unet_root, dim=6, alpha=1, args=args)
    assert len(network.adapters) == 788
    sizes = {(a.rank, round(a.scale * a.rank, 6)) for a in network.adapters.values()}
    assert sizes == {(2, 0.5), (6, 3.0)}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0.5", [0.5] + [1.0] * 8),  # a list of one, as mid_lr_weight has it
        ("0.5,,2", [0.5, 0.0, 2.0] + [1.0] * 6),
        ("zeros", [0.0] * 9),
        ("linear", [i / 8 for i in range(9)]),
        ("reverse_linear+0.5", [i / 8 + 0.5 for i in reversed(range(9))]),
        ("sine", [math.sin(math.pi / 2 * i / 8) for i in range(9)]),
        ("cosine+.25", [math.sin(math.pi / 2 * i / 8) + 0.25 for i in reversed(range(9))]),
    ],
)
def test_weights_of_the_blocks(text, wanted):
    for key, first in (("down_lr_weight", 1), ("up_lr_weight", 13)):
        rates = lora_args({key: text}).block_rates
        assert rates[first : first + 9] == pytest.approx(wanted)
        assert all(rate == 1 for i, rate in enumerate(rates) if not first <= i < first + 9)


def test_a_weight_of_zero_takes_the_block_out_and_every_block_has_a_group(full_roots):
    args = {"down_lr_weight": "linear", "mid_lr_weight": "0.5,0.1", "block_lr_zero_threshold": "0.6"}
    network = lora.create(full_roots, dim=4, alpha=1, args=args)
    groups = network.param_groups(1e-3, (2e-4, 3e-4), None)
    rates = {group["name"]: group["lr"] for group in groups}
    blocks = {f"unet_block{i}": pytest.approx(1e-3) for i in (13, 14, 15, 16, 17, 18)}
    assert rates == {
        "textencoder1": 2e-4,
        "textencoder2": 3e-4,
        "unet_block6": pytest.approx(1e-3 * 5 / 8),
        "unet_block8": pytest.approx(1e-3 * 7 / 8),
        "unet_block9": pytest.approx(1e-3),
        **blocks,
    }
    assert [name for name in rates if "block" in name] == sorted(
        (name for name in rates if "block" in name), key=lambda name: int(name[10:])
    )
    assert not any("middle_block" in name or "input_blocks_4" in name for name in network.adapters)


def test_lora_plus_gives_up_weights_a_rate_of_their_own(full_roots):
    args = {"loraplus_lr_ratio": "4", "loraplus_unet_lr_ratio": "16", "up_lr_weight": "1,0.5"}
    network = lora.create(full_roots, dim=4, alpha=1, args=args)
    groups = {group["name"]: group for group in network.param_groups(1e-3, (1e-4,), None)}
    assert groups["textencoder2 plus"]["lr"] == pytest.approx(4e-4) and groups["textencoder2"]["lr"] == 1e-4
    assert groups["unet_block14"]["lr"] == pytest.approx(5e-4)
    assert groups["unet_block14 plus"]["lr"] == pytest.approx(8e-3)
    plus = {id(p) for name, group in groups.items() if name.endswith("plus") for p in group["params"]}
    ups = {id(p) for name, p in network.named_parameters() if "lora_up" in name and p.requires_grad}
    assert plus == ups
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)


RULES = (
    "attn1_to_[qk]$ -> dim=8 alpha=2 lr=5e-5; (?:lora_te1).*mlp -> off; time_embed -> dim=3; "
    "attn1 -> off; ff_net -> lr=0"
)


def test_rules_decide_rank_alpha_and_rate_by_name(full_roots):
    network = lora.create(full_roots, dim=4, alpha=1, args={"target_rules": RULES})
    found = network.adapters
    name = "lora_unet_middle_block_1_transformer_blocks_3_"
    assert (found[name + "attn1_to_q"].rank, found[name + "attn1_to_q"].scale) == (8, 0.25)
    assert name + "attn1_to_v" not in found and found[name + "attn2_to_v"].rank == 4
    assert found["lora_unet_time_embed_0"].rank == 3  # a module that training leaves out otherwise
    assert not any(key.startswith("lora_te1") and "mlp" in key for key in found)
    assert any(key.startswith("lora_te2") and "mlp" in key for key in found)
    groups = {group["name"]: group for group in network.param_groups(1e-3, (1e-4,), None)}
    assert groups["unet rule1"]["lr"] == 5e-5 and len(groups["unet rule1"]["params"]) == 70 * 2 * 2
    assert set(groups) == {"textencoder1", "textencoder2", "unet", "unet rule1"}
    assert not any(p.requires_grad for p in found[name + "ff_net_2"].parameters())


def test_a_rule_that_decides_nothing_is_named(unet_root):
    with pytest.raises(UserError, match="rule 2 of target_rules"):
        lora.create(unet_root, dim=4, alpha=1, args={"target_rules": "attn1 -> dim=8; attn1_to_q -> dim=2"})


@pytest.mark.parametrize(
    ("kind", "args", "what"),
    [
        ("lora", {"target_rules": "attn1"}, 'is not "expression -> dim=8'),
        ("lora", {"target_rules": "attn1( -> dim=8"}, "is not a regular expression"),
        ("lora", {"target_rules": "attn1 -> rank=8"}, "none of dim=, alpha=, lr="),
        ("lora", {"target_rules": "attn1 -> dim=8.5"}, "is not a whole number"),
        ("lora", {"target_rules": "attn1 -> lr=-1"}, "must not be negative"),
        ("lora", {"block_dims": "1,2,3"}, "has 3 values; SDXL's U-Net has 23 blocks"),
        ("lora", {"block_dims": listed(0)}, "0 for every block"),
        ("lora", {"down_lr_weight": "1,2,3,4,5,6,7,8,9,10"}, "has 10 values, SDXL has 9 blocks"),
        ("lora", {"down_lr_weight": "sinus"}, "must be numbers, or one of sine"),
        ("lora", {"mid_lr_weight": "sine"}, "takes no preset"),
        ("lora", {"down_lr_weight": "zeros", "mid_lr_weight": ",,", "up_lr_weight": "zeros"}, "0 for every block"),
        ("lora", {"block_lr_zero_threshold": "0.1"}, "given without down_lr_weight"),
        ("lora", {"conv_block_alphas": listed(1)}, "given without conv_dim"),
        ("lora", {"loraplus_lr_ratio": "0"}, "must be above 0"),
        ("lora", {"rs_lora": "maybe"}, "must be true or false"),
        ("lora", {"unit": "2"}, "not an argument of networks.lora"),
        ("lora_fa", {"loraplus_lr_ratio": "4"}, "down weights do not train"),
        ("dylora", {"unit": "3"}, "unit=3 does not divide the rank 4"),
        ("dylora", {"conv_dim": "8"}, "differs from network_dim 4"),
        ("oft", {"conv_dim": "8"}, "not an argument of networks.oft"),
    ],
)
def test_wrong_arguments_are_named(kind, args, what):
    (problem,) = problems_of(f"networks.{kind}", args, None)
    assert what in problem.what and problem.where == "network_args"


def test_dropout_and_sizes_are_refused_where_they_cannot_act():
    assert "has no dropout" in problems_of("networks.oft", {}, 0.1)[0].what
    assert "has no dropout" in problems_of("networks.dylora", {}, 0.1)[0].what
    (problem,) = problems_of("networks.lora", {"conv_dim": "4", "rank_dropout": "0.1"}, None, dim_from_weights=True)
    assert "conv_dim cannot be used with dim_from_weights" in problem.what

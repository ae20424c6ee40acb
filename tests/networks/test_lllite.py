"""ControlNet-LLLite: names and shapes of sd-scripts, what it computes, its files, and what it does not touch."""

import re

import pytest
import torch
import torch.nn.functional as F

from library.errors import UserError
from networks import control_net_lllite as lllite
from networks import lora
from tests.networks.parts import TINY_UNET, make_roots, make_unet, predict, unet_inputs


@pytest.fixture
def root(tiny_unet):
    return make_roots(tiny_unet.requires_grad_(False))[0]


def control(rows: int = 2, height: int = 64, width: int = 64, seed: int = 5):
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def moved(network, size: float = 0.1):
    """The network as training would leave it."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in network.parts.values():
            for parameter in part.up.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=g) * size)
    return network.eval()


@pytest.fixture(scope="module")
def unloaded():
    """The tiny U-Net without weights."""
    with torch.device("meta"):
        return make_roots(make_unet(**TINY_UNET))[0]


@pytest.fixture
def network(root):
    torch.manual_seed(2)
    made = moved(lllite.create(root, cond_emb_dim=8, mlp_dim=6))
    made.attach()
    yield made
    made.detach()


def test_names_and_shapes_at_full_size_are_those_of_sd_scripts(full_roots):
    (root,) = (root for root in full_roots if root.part == "unet")
    network = lllite.create(root, cond_emb_dim=32, mlp_dim=64)
    depths = [part.depth for part in network.parts.values()]
    assert (len(depths), depths.count(2), depths.count(3)) == (136, 16, 120)
    shapes = {
        f"{name}.{k}": tuple(v.shape) for name, part in network.parts.items() for k, v in part.state_dict().items()
    }
    block = re.compile(
        r"lllite_unet_(input_blocks_[4578]|middle_block)_1_transformer_blocks_(\d)_(attn1_to_[qkv]|attn2_to_q)"
    )
    assert all(block.fullmatch(name) for name in network.parts)
    shared = {"down.0.bias": (64,), "mid.0.weight": (64, 96), "mid.0.bias": (64,)}
    for name, cells, width in (
        ("lllite_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_q", [(16, 3, 4), (32, 16, 4)], 640),
        ("lllite_unet_middle_block_1_transformer_blocks_9_attn1_to_k", [(16, 3, 4), (16, 16, 4), (32, 16, 2)], 1280),
    ):
        wanted = shared | {"down.0.weight": (64, width), "up.0.weight": (width, 64), "up.0.bias": (width,)}
        for index, (outputs, inputs, kernel) in zip((0, 2, 4), cells, strict=False):
            wanted |= {f"conditioning1.{index}.weight": (outputs, inputs, kernel, kernel)}
            wanted |= {f"conditioning1.{index}.bias": (outputs,)}
        own = {key.partition(".")[2]: shape for key, shape in shapes.items() if key.startswith(f"{name}.")}
        assert own == wanted


def test_the_start_is_the_base_model_to_the_bit(root, tiny_unet):
    inputs = unet_inputs()
    base = predict(tiny_unet, inputs)
    network = lllite.create(root)
    network.attach()
    network.set_condition(control())
    assert torch.equal(predict(tiny_unet, inputs), base)
    network.detach()


def test_it_changes_the_layers_inputs_by_the_papers_formula(root, tiny_unet, network):
    name = "lllite_unet_input_blocks_7_1_transformer_blocks_1_attn1_to_k"
    part, image = network.parts[name], control()
    layer = tiny_unet.down_blocks[2].attentions[0].transformer_blocks[1].attn1.to_k
    weights = part.state_dict()
    cond = image
    for index, stride in ((0, 4), (2, 4), (4, 2)):
        cond = F.relu(cond) if index else cond
        cond = F.conv2d(cond, weights[f"conditioning1.{index}.weight"], weights[f"conditioning1.{index}.bias"], stride)
    cond = cond.permute(0, 2, 3, 1).reshape(2, 4, 8)  # row after row: the order of tokens
    x = torch.randn(2, 4, layer.in_features, generator=torch.Generator().manual_seed(0))
    hidden = F.relu(F.linear(x, weights["down.0.weight"], weights["down.0.bias"]))
    hidden = F.relu(F.linear(torch.cat([cond, hidden], -1), weights["mid.0.weight"], weights["mid.0.bias"]))
    change = F.linear(hidden, weights["up.0.weight"], weights["up.0.bias"])
    network.set_multiplier(0.5)
    network.set_condition(image)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x + 0.5 * change, layer.weight, layer.bias))
        both = torch.cat([x, -x])  # two branches of guidance: each has its picture's condition
        torch.testing.assert_close(layer(both)[2:], layer(torch.cat([-x, x]))[:2])
        torch.testing.assert_close(layer(both)[:2], layer(x))


def test_it_acts_on_pictures_of_any_size_and_only_while_it_has_a_condition(tiny_unet, network):
    inputs = unet_inputs()
    network.set_condition(None)
    base = predict(tiny_unet, inputs)
    network.set_condition(control())
    assert (predict(tiny_unet, inputs) - base).abs().max() > 1e-3
    with torch.no_grad():
        other = network.parts["lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q"].embed(control(1, 72, 104))
    assert other.shape == (1, 3 * 4, 8)
    odd = inputs | {"sample": torch.randn(2, 4, 9, 13)}
    network.set_condition(control(2, 72, 104))
    assert predict(tiny_unet, odd).shape == (2, 4, 9, 13)
    network.set_condition(control())
    network.set_multiplier(0.0)
    assert torch.equal(predict(tiny_unet, inputs), base)


def test_a_live_lora_on_the_same_layers_gives_what_a_merged_one_gives(root, tiny_unet, network):
    inputs = unet_inputs()
    network.set_condition(control())
    adapters = lora.create([root], dim=2, alpha=2.0, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(2)
    for adapter in adapters.adapters.values():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.2, generator=g)
    adapters.eval().attach()
    live = predict(tiny_unet, inputs)
    adapters.detach()
    alone = predict(tiny_unet, inputs)
    adapters.merge()
    merged = predict(tiny_unet, inputs)
    adapters.unmerge()
    torch.testing.assert_close(live, merged, atol=1e-4, rtol=1e-3)
    assert (live - alone).abs().max() > 1e-3


def test_the_later_of_two_networks_acts_first(root, tiny_unet, network):
    second = moved(lllite.create(root, cond_emb_dim=4, mlp_dim=3), 0.3)
    second.attach()
    name = "lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    layer = tiny_unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(1, 4, layer.in_features, generator=torch.Generator().manual_seed(0))
    for each, seed in ((network, 1), (second, 2)):
        each.set_condition(control(1, seed=seed))
    with torch.no_grad():
        got = layer(x)
        for each in (second, network):
            x = x + each.parts[name].change(x, each.parts[name].condition_BNE)
        second.detach()
        torch.testing.assert_close(got, F.linear(x, layer.weight, layer.bias))


def test_a_file_gives_the_same_output_and_tells_its_sizes(root, tiny_unet, network):
    inputs = unet_inputs()
    network.set_condition(control())
    wanted = predict(tiny_unet, inputs)
    network.set_condition(None)
    tensors = network.export()
    assert len(tensors) == len({key for key in tensors if key.startswith("lllite_unet_")})
    again = lllite.read(root, tensors)
    assert (again.cond_emb_dim, again.mlp_dim) == (8, 6) and again.facts == network.facts
    again.eval().attach()
    again.set_condition(control())
    assert torch.equal(predict(tiny_unet, inputs), wanted)
    again.detach()
    half = network.export(dtype=torch.float16)
    assert {value.dtype for value in half.values()} == {torch.float16}
    part_of_it = {key: value for key, value in tensors.items() if "middle_block" in key}
    assert len(lllite.read(root, part_of_it).parts) < len(network.parts)


def test_dropout_acts_in_training_only(network, tiny_unet):
    inputs = unet_inputs()
    network.set_condition(control())
    whole = predict(tiny_unet, inputs)
    for part in network.parts.values():
        part.dropout = 0.5
    assert torch.equal(predict(tiny_unet, inputs), whole)
    network.train()
    assert not torch.equal(predict(tiny_unet, inputs), whole)


MIDDLE = "lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t | {f"{MIDDLE}.mid.0.bias": torch.ones(9)}, "this model needs (6,)"),
        (lambda t: {}, "the file holds no tensors"),
        (lambda t: {"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, "it is a LoRA"),
        (lambda t: {"model.diffusion_model.out.2.weight": torch.ones(2)}, "a whole checkpoint"),
        (lambda t: {"controlnet_cond_embedding.conv_in.weight": torch.ones(2)}, "it is a ControlNet"),
        (lambda t: {"weight": torch.ones(2)}, "no ControlNet-LLLite"),
        (lambda t: {k: v for k, v in t.items() if "conditioning1.0.weight" not in k}, "has no conditioning1.0.weight"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith(f"{MIDDLE}.mid.0.bias")}, 'mid.0.bias" is missing'),
        (lambda t: t | {"lllite_unet_output_blocks_0_1_x.up.0.bias": torch.ones(2)}, "are not in this model"),
        (
            lambda t: t | {f"{MIDDLE}.down.0.weight": torch.ones(6, 1280)},
            "layer of 1280 numbers, this model's has 80: the LLLite was",
        ),
        (lambda t: t | {f"{MIDDLE}.up.0.bias": torch.full((80,), float("nan"))}, "not finite"),
        (lambda t: t | {f"{MIDDLE}.alpha": torch.ones(1)}, 'alpha" is not a tensor'),
    ],
)
def test_files_of_other_kinds_or_for_other_models_are_refused_in_a_sentence(root, network, unloaded, change, what):
    with pytest.raises(UserError) as caught:
        lllite.read(root, change(network.export()), where="some.safetensors")
    (problem,) = caught.value.problems
    assert what in problem.what and problem.where == "some.safetensors" and problem.fix
    with pytest.raises(UserError) as caught:
        lllite.check_base(unloaded, change(network.export()), where="some.safetensors")
    assert caught.value.problems == (problem,), "the same is found without the model's weights"


def test_the_adapters_of_loras_refuse_it_by_name(root, network):
    with pytest.raises(UserError, match="ControlNet-LLLite"):
        lora.create_from_weights([root], network.export())

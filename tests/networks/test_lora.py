"""The mathematics, the training behaviour and the file of a LoRA."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from library.errors import UserError
from networks import lora
from tests.networks.parts import filled, make_roots, predict, unet_inputs

MODULES = {
    "linear": (lambda: nn.Linear(6, 5), (3, 7, 6)),
    "linear on vectors": (lambda: nn.Linear(6, 5), (3, 6)),
    "conv3x3 stride 2": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1), (3, 4, 8, 8)),
    "conv1x1": (lambda: nn.Conv2d(4, 5, 1), (3, 4, 8, 8)),
}


@pytest.fixture(params=MODULES)
def module_and_input(request):
    torch.manual_seed(0)
    make, shape = MODULES[request.param]
    return make().requires_grad_(False), torch.randn(shape)


@pytest.fixture
def attached(tiny_roots):
    """Makes networks on the tiny model and takes them off again after the test."""
    made = []

    def make(**settings):
        settings = {"dim": 4, "alpha": 2.0} | settings
        network = lora.create(tiny_roots, **settings).eval()
        made.append(network)
        return network.attach()

    yield make
    for network in made:
        if network.attached:
            network.detach()


def test_at_the_start_the_model_is_bitwise_the_base_model(tiny_unet, attached):
    inputs = unet_inputs()
    before = predict(tiny_unet, inputs)
    network = attached(args={"conv_dim": "2"})
    assert torch.equal(predict(tiny_unet, inputs), before)
    filled(network)
    assert not torch.allclose(predict(tiny_unet, inputs), before, atol=1e-3)
    network.set_multiplier(0.0)
    assert torch.equal(predict(tiny_unet, inputs), before)
    network.detach()
    assert torch.equal(predict(tiny_unet, inputs), before)
    assert not any("forward" in module.__dict__ for module in tiny_unet.modules())


def test_the_addition_is_alpha_over_rank_times_up_of_down(module_and_input):
    module, x = module_and_input
    adapter = lora.LoraAdapter(module, rank=3, alpha=1.5)
    nn.init.normal_(adapter.lora_up.weight)
    base = module(x)
    adapter.multiplier = 0.7
    adapter.attach()
    down = adapter.lora_down.weight
    if isinstance(module, nn.Conv2d):
        h = F.conv2d(x, down, stride=module.stride, padding=module.padding)
        wanted = F.conv2d(h, adapter.lora_up.weight)
    else:
        wanted = x @ down.T @ adapter.lora_up.weight.T
    torch.testing.assert_close(module(x), base + 0.7 * (1.5 / 3) * wanted)


def test_merged_weights_give_what_the_adapter_gives(module_and_input):
    module, x = module_and_input
    adapter = lora.LoraAdapter(module, rank=3, alpha=1.0)
    nn.init.normal_(adapter.lora_up.weight)
    adapter.attach()
    applied = module(x)
    adapter.detach()
    with torch.no_grad():
        module.weight += adapter.delta_weight()
    torch.testing.assert_close(module(x), applied, atol=1e-5, rtol=1e-5)


def test_merging_into_the_unet_equals_applying_and_unmerging_is_bitwise(tiny_unet, attached):
    inputs = unet_inputs()
    network = filled(attached(args={"conv_dim": "2"}), size=0.05)
    network.set_multiplier(0.8)
    weights = {name: w.clone() for name, w in tiny_unet.state_dict().items()}
    applied = predict(tiny_unet, inputs)
    network.detach()
    base = predict(tiny_unet, inputs)
    network.merge()
    torch.testing.assert_close(predict(tiny_unet, inputs), applied, atol=2e-4, rtol=1e-4)
    assert (applied - base).abs().max() > 0.01
    network.unmerge()
    assert all(torch.equal(w, weights[name]) for name, w in tiny_unet.state_dict().items())


def test_two_networks_add_up_and_come_off_in_any_order(tiny_unet, attached):
    inputs = unet_inputs()
    base = predict(tiny_unet, inputs)
    first, second = filled(attached(), seed=1), filled(attached(), seed=2)
    both = predict(tiny_unet, inputs)
    first.detach()
    only_second = predict(tiny_unet, inputs)
    second.detach()
    assert torch.equal(predict(tiny_unet, inputs), base)
    second.attach()
    assert torch.equal(predict(tiny_unet, inputs), only_second)
    assert not torch.allclose(both, only_second, atol=1e-4)


def test_alpha_of_none_or_zero_is_the_rank():
    for alpha in (None, 0):
        adapter = lora.LoraAdapter(nn.Linear(4, 4), rank=8, alpha=alpha)
        assert adapter.scale == 1.0 and float(adapter.alpha) == 8.0


def test_down_starts_kaiming_uniform_and_a_seed_decides_it(tiny_roots):
    def down(seed):
        network = lora.create(tiny_roots, dim=16, alpha=1, generator=torch.Generator().manual_seed(seed))
        return next(a.lora_down.weight for n, a in network.adapters.items() if n.endswith("ff_net_2"))

    first = down(5)
    assert torch.equal(first, down(5)) and not torch.equal(first, down(6))
    bound = 1 / math.sqrt(first.shape[1])  # kaiming uniform with a = sqrt 5 is uniform within 1/sqrt(fan in)
    assert 0.95 * bound < first.abs().max() <= bound


@pytest.mark.parametrize("option", ["dropout", "rank_dropout", "module_dropout"])
def test_dropouts_act_in_training_keep_the_mean_and_do_nothing_in_eval(option):
    torch.manual_seed(0)
    module = nn.Linear(16, 16)
    adapter = lora.LoraAdapter(module, rank=8, alpha=8, **{option: 0.25})
    nn.init.normal_(adapter.lora_up.weight)
    x = torch.randn(4, 3, 16)
    still = adapter.eval().forward_delta(x)
    assert torch.equal(still, adapter.forward_delta(x))
    adapter.train()
    with torch.no_grad():
        draws = torch.stack([adapter.forward_delta(x).expand_as(still) for _ in range(3000)])
    assert draws.std(0).max() > 0.1
    # Module dropout has no rescaling, in sd-scripts as here: its mean is the keep probability.
    keep = 0.75 if option == "module_dropout" else 1.0
    error = (draws.mean(0) - keep * still).abs() / (draws.std(0) / math.sqrt(3000) + 1e-6)
    assert error.max() < 5.5


def test_rank_dropout_is_drawn_once_per_sample():
    module = nn.Linear(8, 8)
    adapter = lora.LoraAdapter(module, rank=1, alpha=1, rank_dropout=0.5).train()
    nn.init.normal_(adapter.lora_up.weight)
    torch.manual_seed(0)
    out = adapter.forward_delta(torch.randn(64, 5, 8))
    dropped = (out == 0).all(-1)
    assert (dropped.all(1) == dropped.any(1)).all() and 0 < dropped[:, 0].sum() < 64


def test_module_dropout_leaves_zero_gradients_rather_than_none():
    adapter = lora.LoraAdapter(nn.Linear(8, 8), rank=2, alpha=1, module_dropout=0.999999)
    torch.manual_seed(0)
    (adapter.train().forward_delta(torch.randn(2, 8)) + torch.ones(2, 8, requires_grad=True)).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in adapter.parameters())


def test_half_precision_base_with_float32_adapter(tiny_unet):
    module = nn.Linear(8, 8).to(torch.bfloat16)
    adapter = lora.LoraAdapter(module, rank=4, alpha=4)
    nn.init.normal_(adapter.lora_up.weight)
    adapter.attach()
    x = torch.randn(2, 3, 8)
    plain = module(x.bfloat16())
    assert plain.dtype == torch.bfloat16
    plain.float().sum().backward()
    assert adapter.lora_up.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = module(x)
    assert auto.dtype == torch.bfloat16
    torch.testing.assert_close(auto.float(), plain.float(), atol=0.05, rtol=0.05)


def test_gradients_are_the_same_with_gradient_checkpointing(tiny_unet, attached):
    network = filled(attached()).train()
    inputs = unet_inputs()

    def gradients():
        network.zero_grad()
        tiny_unet(**inputs).sample.square().mean().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    tiny_unet.train()
    plain = gradients()
    tiny_unet.enable_gradient_checkpointing()
    try:
        checkpointed = gradients()
    finally:
        tiny_unet.disable_gradient_checkpointing()
        tiny_unet.eval()
    assert len(plain) > 100 and all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_only_adapter_parameters_are_registered(tiny_roots, tiny_unet):
    network = lora.create(tiny_roots, dim=2, alpha=1)
    ours = {id(p) for p in network.parameters()}
    assert ours.isdisjoint(id(p) for root in tiny_roots for p in root.module.parameters())
    assert sum(p.numel() for p in network.parameters()) < 200_000


@pytest.mark.parametrize(
    ("unet_lr", "text", "default", "wanted"),
    [
        (None, (), 1e-3, {"textencoder1": 1e-3, "textencoder2": 1e-3, "unet": 1e-3}),
        (1e-4, (2e-5,), 1e-3, {"textencoder1": 2e-5, "textencoder2": 2e-5, "unet": 1e-4}),
        (1e-4, (2e-5, 3e-5), 1e-3, {"textencoder1": 2e-5, "textencoder2": 3e-5, "unet": 1e-4}),
        (None, (0.0, 3e-5), 1e-3, {"textencoder2": 3e-5, "unet": 1e-3}),
        (0.0, (), 1e-3, {"textencoder1": 1e-3, "textencoder2": 1e-3}),
        (1e-4, (), None, {"unet": 1e-4}),
    ],
)
def test_param_groups_follow_the_rates(tiny_roots, unet_lr, text, default, wanted):
    network = lora.create(tiny_roots, dim=2, alpha=1)
    groups = network.param_groups(unet_lr, text, default)
    assert {g["name"]: g["lr"] for g in groups} == wanted
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)


def test_without_any_rate_nothing_would_train(tiny_roots):
    with pytest.raises(UserError):
        lora.create(tiny_roots, dim=2, alpha=1).param_groups(0.0, (0.0, 0.0), 1e-3)


def test_conv_rank_and_alpha_only_act_on_spatial_convolutions(tiny_roots):
    network = lora.create(tiny_roots, dim=6, alpha=3, args={"conv_dim": "2", "conv_alpha": "1"})
    ranks = {name: (a.rank, float(a.alpha)) for name, a in network.adapters.items()}
    assert ranks["lora_unet_input_blocks_3_0_op"] == (2, 1.0)
    assert ranks["lora_unet_input_blocks_1_0_emb_layers_1"] == (6, 3.0)
    assert ranks["lora_unet_output_blocks_0_0_skip_connection"] == (6, 3.0)
    assert network.facts["ss_network_dim"] == "6" and "conv_dim" in network.facts["ss_network_args"]


def test_unet_only_roots_make_a_unet_only_network(tiny_unet):
    network = lora.create(make_roots(tiny_unet), dim=2, alpha=1)
    assert [g["name"] for g in network.param_groups(None, (), 1e-3)] == ["unet"]

"""The formulas of the kinds, against closed forms and other libraries."""

import copy
import math

import pytest
import torch
from torch import nn

from library.errors import UserError
from networks import dora, dylora, lora, lora_fa, oft

MODULES = {
    "linear": lambda: nn.Linear(6, 8),
    "conv3x3": lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1),
    "conv1x1": lambda: nn.Conv2d(4, 8, 1),
}


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    return MODULES[request.param]().requires_grad_(False)


def filled_dora(module, on_output=True):
    adapter = dora.DoraAdapter(module, on_output=on_output, rank=3, alpha=1.5)
    nn.init.normal_(adapter.lora_up.weight)
    with torch.no_grad():
        adapter.dora_scale.mul_(torch.rand_like(adapter.dora_scale) + 0.5)
    return adapter


@pytest.mark.parametrize("on_output", [True, False])
def test_dora_is_magnitude_times_direction(module, on_output):
    adapter = filled_dora(module, on_output)
    low = (adapter.lora_up.weight.flatten(1) @ adapter.lora_down.weight.flatten(1)).reshape(module.weight.shape)
    moved = module.weight + 1.5 / 3 * low
    norms = moved.flatten(1).norm(dim=1) if on_output else moved.transpose(0, 1).flatten(1).norm(dim=1)
    ones = [1] * (module.weight.ndim - 2)
    norms = norms.reshape((-1, 1, *ones) if on_output else (1, -1, *ones))
    assert adapter.dora_scale.shape == norms.shape
    torch.testing.assert_close(module.weight + adapter.delta_weight(), adapter.dora_scale * moved / norms)


def test_doras_norm_is_a_constant_for_gradients(module):
    adapter = filled_dora(module)
    weight = module.weight + adapter.delta_weight()
    weight.square().sum().backward()
    norm = adapter._norm()
    wanted = (2 * weight.detach() * (module.weight + lora.LoraAdapter.delta_weight(adapter)).detach() / norm).flatten(1)
    torch.testing.assert_close(adapter.dora_scale.grad.flatten(), wanted.sum(1), rtol=1e-4, atol=1e-4)
    # With a constant norm, the gradient of the factors is that of a LoRA whose output is m / norm times as large.
    outer = (2 * weight * adapter.dora_scale / norm).detach().flatten(1) * adapter.scale
    torch.testing.assert_close(adapter.lora_down.weight.grad.flatten(1), adapter.lora_up.weight.flatten(1).T @ outer)


def test_dora_notices_what_is_merged_into_its_base():
    module = nn.Linear(6, 8).requires_grad_(False)
    adapter = filled_dora(module)
    module.weight.mul_(2.0)
    moved = module.weight + lora.LoraAdapter.delta_weight(adapter)
    torch.testing.assert_close(adapter._norm().flatten(), moved.norm(dim=1))


@pytest.mark.parametrize("on_output", [True, False])
def test_lycoris_reads_our_dora_as_we_do(module, on_output):
    locon = pytest.importorskip("lycoris.modules.locon")
    adapter = filled_dora(module, on_output)
    theirs = locon.LoConModule(
        "name", module, 1.0, 3, 1.5, weight_decompose=True, wd_on_out=on_output, use_tucker=False
    )
    with torch.no_grad():
        theirs.lora_up.weight.copy_(adapter.lora_up.weight)
        theirs.lora_down.weight.copy_(adapter.lora_down.weight)
        theirs.dora_scale.copy_(adapter.dora_scale)
        merged, _ = theirs.get_merged_weight()
    torch.testing.assert_close(merged, module.weight + adapter.delta_weight(), atol=1e-5, rtol=1e-5)


def test_peft_computes_our_dora_as_we_do(module):
    import peft

    adapter = filled_dora(module)
    x = torch.randn(2, 5, 6) if isinstance(module, nn.Linear) else torch.randn(2, 4, 7, 7)
    host = nn.ModuleDict({"layer": copy.deepcopy(module)})
    config = peft.LoraConfig(r=3, lora_alpha=1.5, use_dora=True, target_modules=["layer"])
    layer = peft.inject_adapter_in_model(config, host)["layer"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapter.lora_down.weight)
        layer.lora_B["default"].weight.copy_(adapter.lora_up.weight)
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.copy_(adapter.dora_scale.reshape(magnitude.shape))
        wanted = layer.eval()(x)
        torch.testing.assert_close(module(x) + adapter.eval().forward_delta(x), wanted, atol=1e-5, rtol=1e-4)


def test_dylora_cut_to_k_ranks_is_what_training_at_k_computes(module):
    adapter = dylora.DyloraAdapter(module, unit=2, rank=6, alpha=3.0)
    nn.init.normal_(adapter.lora_up.weight)
    x = torch.randn(2, 6) if isinstance(module, nn.Linear) else torch.randn(2, 4, 7, 7)
    for first in (0, 2, 4):
        k = first + 2
        cut = lora.LoraAdapter(module, rank=k, alpha=3.0)
        cut.load_file_tensors(
            {
                "lora_down.weight": adapter.lora_down.weight[:k].detach(),
                "lora_up.weight": adapter.lora_up.weight[:, :k].detach(),
                "alpha": adapter.alpha,
            }
        )
        torch.testing.assert_close(adapter.delta_of_ranks(x, first), cut.forward_delta(x))
        adapter.zero_grad()
        adapter.delta_of_ranks(x, first).square().sum().backward()
        for gradient, dim in ((adapter.lora_down.weight.grad, 0), (adapter.lora_up.weight.grad, 1)):
            others = tuple(d for d in range(gradient.ndim) if d != dim)
            touched = gradient.abs().sum(others).nonzero().flatten().tolist()
            assert touched == [first, first + 1]


def test_dylora_draws_every_multiple_of_the_unit_evenly_and_a_seed_decides():
    adapter = dylora.DyloraAdapter(nn.Linear(4, 4), unit=2, rank=8, alpha=1.0).train()
    drawn: list[int] = []
    adapter.delta_of_ranks = lambda x, first: drawn.append(first)

    def draw():
        torch.manual_seed(3)
        drawn.clear()
        for _ in range(2000):
            adapter.forward_delta(torch.zeros(1, 4))
        return list(drawn)

    first = draw()
    assert first == draw() and set(first) == {0, 2, 4, 6}
    assert all(abs(first.count(value) - 500) < 100 for value in (0, 2, 4, 6))
    with pytest.raises(UserError):
        dylora.DyloraAdapter(nn.Linear(4, 4), unit=3, rank=8, alpha=1.0)


def test_lora_fa_trains_up_only_from_a_normal_down():
    torch.manual_seed(0)
    adapter = lora_fa.LoraFaAdapter(nn.Linear(400, 20), rank=40, alpha=1.0)
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["lora_up.weight"]
    down = adapter.lora_down.weight
    assert abs(down.std() / math.sqrt(2 / 440) - 1) < 0.02 and abs(down.mean()) < 2e-3
    assert down.abs().max() > 2.5 * math.sqrt(2 / 440)  # a uniform draw would end below sqrt(3)


def filled_oft(module, alpha=1.0, size=0.3):
    adapter = oft.OftAdapter(module, num_blocks=2, alpha=alpha)
    nn.init.normal_(adapter.oft_blocks, std=size)
    return adapter


def test_oft_rotates_each_block_of_outputs(module):
    adapter = filled_oft(module, alpha=100.0)
    skew = adapter.oft_blocks - adapter.oft_blocks.transpose(1, 2)
    eye = torch.eye(4)
    rotation = (eye + skew) @ torch.linalg.inv(eye - skew)  # Cayley
    torch.testing.assert_close(adapter.rotation_change() + eye, rotation)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), eye.expand(2, 4, 4), atol=1e-5, rtol=0)
    weight = module.weight + adapter.delta_weight()
    for block in range(2):
        rows = slice(4 * block, 4 * block + 4)
        wanted = rotation[block].T @ module.weight[rows].flatten(1)
        torch.testing.assert_close(weight[rows].flatten(1), wanted)
    # A rotation of the neurons keeps their angles and lengths: W'^T W' per block.
    before, after = module.weight.flatten(1), weight.flatten(1)
    torch.testing.assert_close(after.T @ after, before.T @ before)


def test_large_oft_blocks_are_solved_one_by_one_on_a_cpu(monkeypatch):
    """The batched solver of PyTorch's CPU build never returns for them when it has several threads."""
    adapter, solve, shapes = filled_oft(nn.Linear(8, 160), size=0.01), torch.linalg.solve, []
    monkeypatch.setattr(torch.linalg, "solve", lambda a, b: shapes.append(a.shape) or solve(a, b))
    alone = adapter.rotation_change()
    assert shapes == [(80, 80)] * 2
    monkeypatch.setattr(oft, "_MAX_BATCHED_ON_CPU", 80)
    torch.testing.assert_close(adapter.rotation_change(), alone)
    assert shapes[2:] == [(2, 80, 80)]


def test_oft_holds_the_norm_of_all_blocks_at_alpha_times_outputs():
    module = nn.Linear(6, 8)
    adapter = filled_oft(module, alpha=0.01, size=1.0)
    change = adapter.rotation_change().detach()
    skew = torch.linalg.solve(change + 2 * torch.eye(4), change)  # R - I = 2Q(I - Q)^-1 turned around
    assert float(skew.norm()) == pytest.approx(0.01 * 8, rel=1e-4)
    adapter.load_file_tensors({"oft_blocks": adapter.oft_blocks.detach(), "alpha": torch.tensor(100.0)})
    assert adapter.limit == 800.0


@pytest.mark.parametrize(("alpha", "warns"), [(0.05, False), (0.2, True)])
def test_oft_warns_of_a_bound_that_binds_nothing(tiny_roots, caplog, alpha, warns):
    oft.create(tiny_roots, dim=4, alpha=alpha)
    assert ("holds nothing back" in caplog.text) == warns


@pytest.mark.parametrize("make", [lora.LoraAdapter, lora_fa.LoraFaAdapter, dora.DoraAdapter, dylora.DyloraAdapter])
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_limiting_the_norm(module, make, limit):
    adapter = make(module, rank=4, alpha=2.0)
    nn.init.normal_(adapter.lora_up.weight)
    start = {name: value.clone() for name, value in adapter.state_dict().items()}
    before = lora.LoraAdapter.delta_weight(adapter).detach()
    assert before.norm() > 0.5
    norm, shrunk = adapter.limit_norm(limit)
    after = lora.LoraAdapter.delta_weight(adapter).detach()
    torch.testing.assert_close(after, before * min(1.0, limit / float(before.norm())), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(norm, after.norm(), atol=1e-6, rtol=1e-4)
    assert bool(shrunk) == (limit == 0.5)
    if limit > 1:
        assert all(torch.equal(value, start[name]) for name, value in adapter.state_dict().items())
    elif make is lora_fa.LoraFaAdapter:
        assert torch.equal(adapter.lora_down.weight, start["lora_down.weight"])
    else:
        ratio = (adapter.lora_up.weight / start["lora_up.weight"]).mean()
        torch.testing.assert_close(adapter.lora_down.weight, start["lora_down.weight"] * ratio, atol=1e-6, rtol=1e-3)


def test_limiting_the_norm_of_nothing_is_nothing():
    adapter = lora.LoraAdapter(nn.Linear(4, 4), rank=2, alpha=1.0)
    norm, shrunk = adapter.limit_norm(1.0)
    assert norm == 0 and shrunk == 0


def test_rs_lora_divides_by_the_root_of_the_rank_and_any_reader_of_the_file_does(tiny_roots):
    network = lora.create(tiny_roots, dim=16, alpha=4.0, args={"rs_lora": "true"})
    assert {adapter.scale for adapter in network.adapters.values()} == {4.0 / math.sqrt(16)}
    tensors, facts = network.export()
    assert {float(v) / 16 for k, v in tensors.items() if k.endswith("alpha")} == {1.0}
    assert "rs_lora" in facts["ss_network_args"] and facts["ss_network_alpha"] == "4.0"

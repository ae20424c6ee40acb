"""What every file of networks/ promises, whatever its formula."""

import copy
import importlib
from pathlib import Path

import pytest
import torch

import networks
from library.config.choices import OTHER_NETWORKS
from library.errors import UserError
from library.plugins import list_plugins
from networks._args import KEYS_OF_KIND
from networks._files import FORMATS, format_of
from tests.networks.parts import predict, unet_inputs

# control_net_lllite changes the inputs of layers by a picture: no weight is added, nothing can be merged. It keeps the
# other promises in test_lllite.py.
KINDS = [name for name in list_plugins(Path(networks.__file__).parent) if name not in OTHER_NETWORKS]
# Arguments that widen each kind to everything it can adapt, in a size that fits the tiny models.
WIDE = {
    "lora": {"conv_dim": "2", "rs_lora": "true"},
    "dora": {"conv_dim": "2"},
    "dora on inputs": {"conv_dim": "2", "wd_on_output": "False"},
    "lora_fa": {"conv_dim": "2"},
    "dylora": {"conv_dim": "4", "unit": "2"},
    "oft": {"enable_conv": "true"},
}


def create(name: str, roots, **settings):
    module = importlib.import_module(f"networks.{name.split()[0]}")
    alpha = 0.05 if name == "oft" else 2.0
    settings = {"dim": 4, "alpha": alpha, "args": WIDE[name]} | settings
    return module, module.create(roots, generator=torch.Generator().manual_seed(4), **settings)


def trained(network, seed: int = 3, size: float = 0.05):
    """Move every trained parameter away from its start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in network.adapters.values():
            for name, parameter in adapter.named_parameters():
                if parameter.requires_grad and "lora_down" not in name:
                    parameter.add_(torch.randn(parameter.shape, generator=g) * size)
    return network


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=sorted(WIDE))
def form(request):
    """A kind in one of its forms."""
    return request.param


def test_every_file_of_the_folder_is_here():
    assert {name.split()[0] for name in WIDE} == set(KINDS) == set(KEYS_OF_KIND)
    assert {f"networks.{name}" for name in KINDS} == {name for form in FORMATS for name in form.kinds}


def test_the_start_is_the_base_model_and_what_follows_is_not(kind, tiny_roots, tiny_unet):
    inputs = unet_inputs()
    base = predict(tiny_unet, inputs)
    _, network = create(kind, tiny_roots)
    network.eval().attach()
    assert torch.equal(predict(tiny_unet, inputs), base)
    network.train()
    assert torch.equal(predict(tiny_unet, inputs), base)
    trained(network.eval())
    assert (predict(tiny_unet, inputs) - base).abs().max() > 1e-3
    network.detach()
    assert torch.equal(predict(tiny_unet, inputs), base)


def test_merged_gives_what_applied_gives_at_any_strength(kind, tiny_roots, tiny_unet):
    inputs = unet_inputs()
    _, network = create(kind, tiny_roots)
    trained(network.eval()).set_multiplier(0.7)
    network.attach()
    applied = predict(tiny_unet, inputs)
    network.detach()
    before = {name: w.clone() for name, w in tiny_unet.state_dict().items()}
    network.merge()
    torch.testing.assert_close(predict(tiny_unet, inputs), applied, atol=3e-4, rtol=1e-3)
    network.unmerge()
    assert all(torch.equal(w, before[name]) for name, w in tiny_unet.state_dict().items())


def test_each_adapter_adds_what_its_weight_says(form, tiny_roots):
    _, network = create(form, tiny_roots)
    trained(network.eval())
    seen = set()
    for adapter in network.adapters.values():
        module = copy.copy(adapter.base)
        look = (type(module).__name__, getattr(module, "kernel_size", None), getattr(module, "stride", None))
        if look in seen:
            continue
        seen.add(look)
        shape = (2, 5, module.in_features) if hasattr(module, "in_features") else (2, module.in_channels, 6, 6)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        module.bias = None
        weight = adapter.base.weight
        with torch.no_grad():
            wanted = torch.func.functional_call(module, {"weight": weight + adapter.delta_weight()}, x)
            wanted = wanted - torch.func.functional_call(module, {"weight": weight}, x)
            torch.testing.assert_close(adapter.forward_delta(x), wanted, atol=2e-5, rtol=1e-3)
            given = adapter.forward_delta_from(x, adapter.base(x))
            torch.testing.assert_close(given, wanted, atol=2e-5, rtol=1e-3)
    assert len(seen) >= 4


def test_a_file_gives_the_same_output_in_both_ways_of_loading(kind, tiny_roots, tiny_unet):
    inputs = unet_inputs()
    module, network = create(kind, tiny_roots)
    trained(network.eval()).attach()
    wanted = predict(tiny_unet, inputs)
    network.detach()
    tensors, facts = network.export()
    assert facts["ss_network_module"] == f"networks.{kind.split()[0]}"
    assert facts["ss_network_module"] in format_of(tensors).kinds
    assert all(value.isfinite().all() for value in tensors.values())
    _, again = create(kind, tiny_roots)
    report = again.load(tensors)
    assert not report.missing and not report.unexpected
    for loaded in (again, module.create_from_weights(tiny_roots, tensors)):
        loaded.eval().attach()
        assert torch.equal(predict(tiny_unet, inputs), wanted)
        loaded.detach()
        exported = loaded.export()[0]
        assert exported.keys() == tensors.keys()
        assert all(torch.equal(exported[key], value) for key, value in tensors.items())


def step(network, unet, optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    (unet(**unet_inputs(seed=seed)).sample.square().mean() * 100).backward()
    optimizer.step()


def test_training_moves_the_network_only_and_resumes_exactly(kind, tiny_roots, tiny_unet):
    before = {name: w.clone() for root in tiny_roots for name, w in root.module.state_dict().items()}

    def begin():
        _, network = create(kind, tiny_roots)
        groups = network.param_groups(1e-2, (1e-2,), None)
        return network.train().attach(), torch.optim.AdamW(groups, foreach=False)

    whole, optimizer = begin()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    step(whole, tiny_unet, optimizer, 1)
    kept = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    step(whole, tiny_unet, optimizer, 2)
    whole.detach()
    resumed, optimizer = begin()
    resumed.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    step(resumed, tiny_unet, optimizer, 2)
    resumed.detach()
    end = whole.state_dict()
    assert all(torch.equal(value, end[name]) for name, value in resumed.state_dict().items())
    moved = [name for name in end if not torch.equal(end[name], start[name])]
    trainable = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert moved and set(moved) <= trainable
    assert len([name for name in moved if "unet" in name]) > 50
    after = {name: w for root in tiny_roots for name, w in root.module.state_dict().items()}
    assert all(torch.equal(w, before[name]) for name, w in after.items())


def test_half_precision_bases_work(form, tiny_roots, tiny_unet):
    _, network = create(form, tiny_roots)
    trained(network.eval(), size=0.02)
    adapters = {name: a for name, a in network.adapters.items() if "middle_block_1_transformer_blocks_0_attn1" in name}
    for adapter in adapters.values():
        x = torch.randn(2, 3, adapter.base.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = adapter.forward_delta(x)
        half = copy.deepcopy(adapter)
        half._base = (copy.deepcopy(adapter.base).to(torch.bfloat16),)
        half.place(torch.device("cpu"), torch.bfloat16)
        half.attach()
        with torch.no_grad():
            got = half.base(x.bfloat16()) - half.base.__dict__["adapter_patch"].original_forward(x.bfloat16())
        torch.testing.assert_close(got.float(), wanted, atol=0.06, rtol=0.1)
    assert adapters


def test_files_of_another_kind_are_refused_with_the_right_one(kind, tiny_roots):
    _, network = create(kind, tiny_roots)
    tensors, _ = network.export()
    for other in KINDS:
        form = format_of(tensors)
        if f"networks.{other}" in form.kinds:
            continue
        with pytest.raises(UserError) as error:
            importlib.import_module(f"networks.{other}").create_from_weights(tiny_roots, tensors)
        assert form.title in error.value.problems[0].what
        assert error.value.problems[0].fix == f"use network_module {form.kinds[0]}"

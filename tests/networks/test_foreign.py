"""The interface of sd-scripts' network modules: what is called, in which order, and what comes of the answers."""

import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.errors import UserError
from networks._foreign import ForeignNetwork, Host, create, create_from_weights, is_foreign, untouched_settings
from networks._foreign_args import read_args, unread_args


class Recorder(nn.Module):
    """A network that writes down what happens to it, as a module for sd-scripts is built."""

    TARGETS = ["Linear"]  # noqa: RUF012 (sd-scripts' modules have such class settings)

    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.text = nn.Parameter(torch.ones(2))
        self.unet = nn.Parameter(torch.ones(3))
        self.register_buffer("kept", torch.tensor(1.0))
        self.register_buffer("dropped", torch.tensor(1.0), persistent=False)

    def apply_to(self, *args):
        self.calls.append(("apply_to", args))

    def prepare_optimizer_params(self, *rates):
        self.calls.append(("prepare_optimizer_params", rates))
        groups = [{"params": {"a": self.text}.values(), "lr": rates[0]}, {"params": [self.unet]}]
        return groups, ["textencoder", "unet"]

    def prepare_grad_etc(self, *_):
        self.calls.append(("prepare_grad_etc", ()))
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet):
        self.calls.append(("on_epoch_start", (text_encoder, unet)))

    def load_weights(self, file):
        self.calls.append(("load_weights", (file,)))

    def save_weights(self, file, dtype, metadata):
        assert metadata == {}
        tensors = {f"own.{name}": value.to(dtype or value.dtype).clone() for name, value in self.state_dict().items()}
        save_file(tensors, file, {"ss_own": "yes", "sshs_model_hash": "of another file"})


def module_of(build, **more):
    module = types.ModuleType("recorder")
    module.create_network = build
    vars(module).update(more, Recorder=Recorder)
    return module


@pytest.fixture
def calls():
    return []


@pytest.fixture
def host():
    return Host([nn.Linear(1, 1), nn.Linear(1, 1)], nn.Linear(2, 2), nn.Linear(3, 3))


@pytest.fixture
def network(calls, host):
    return ForeignNetwork(Recorder(calls), host, module="recorder", facts={})


def test_create_network_gets_sd_scripts_arguments(calls, host):
    def create_network(*args, **kwargs):
        calls.append((args, kwargs))
        return Recorder(calls)

    create(module_of(create_network), host, dim=8, alpha=4.0, dropout=0.1, args={"algo": "x", "conv_dim": "2"})
    ((args, kwargs),) = calls
    assert args == (1.0, 8, 4.0, host.vae, host.text_encoders, host.unet)
    assert kwargs == {"neuron_dropout": 0.1, "dropout": 0.1, "algo": "x", "conv_dim": "2"}
    create(module_of(create_network), host, dim=None, alpha=1.0, dropout=None, args={"dropout": "0.3"})
    assert calls[1][1] == {"neuron_dropout": None, "dropout": "0.3"}, "the argument wins, and is a text"


def test_a_module_that_makes_no_network_or_fails_is_named(host):
    with pytest.raises(UserError, match="recorder made no network"):
        create(module_of(lambda *_, **__: None), host, dim=4, alpha=1.0, dropout=None, args={})

    def failing(*_, **__):
        raise AssertionError("block_dims must have 23 elements")

    with pytest.raises(UserError, match="recorder failed with AssertionError: block_dims must have 23"):
        create(module_of(failing), host, dim=4, alpha=1.0, dropout=None, args={})
    with pytest.raises(UserError, match="cannot build a network from a file"):
        create_from_weights(module_of(failing), host, "a.safetensors")


def test_the_module_decides_the_groups_and_what_it_leaves_out_is_frozen(calls, network, host):
    network.network.extra = nn.Parameter(torch.ones(1))
    groups = network.param_groups(text_encoder_lrs=[0.5, 0.25], unet_lr=None, default_lr=0.125)
    assert [(g["name"], g["lr"]) for g in groups] == [("textencoder", 0.5), ("unet", 0.125)]
    assert [id(g["params"][0]) for g in groups] == [id(network.network.text), id(network.network.unet)]
    assert [name for name, _ in calls] == ["prepare_optimizer_params", "prepare_grad_etc"]
    assert calls[0][1] == (0.5, None, 0.125), "one rate for both text encoders: the first"
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == {"network.extra"}


def test_a_module_with_several_text_encoder_rates_gets_the_list(network):
    seen = []

    def several(*rates):
        seen.append(rates)
        return [network.network.unet]  # a plain list of parameters, without descriptions

    network.network.prepare_optimizer_params_with_multiple_te_lrs = several
    (group,) = network.param_groups(text_encoder_lrs=[0.5, 0.25], unet_lr=0.1, default_lr=0.125)
    assert seen == [([0.5, 0.25], 0.1, 0.125)]
    assert (group["name"], group["lr"]) == ("network 1", 0.125) and not network.network.text.requires_grad


def test_an_older_module_is_asked_again_with_two_rates(network):
    seen = []

    def two(te_lr, unet_lr):
        seen.append((te_lr, unet_lr))
        return [{"params": [network.network.unet], "lr": unet_lr}]

    network.network.prepare_optimizer_params = two
    (group,) = network.param_groups(text_encoder_lrs=[], unet_lr=0.1, default_lr=0.125)
    assert seen == [(None, 0.1)] and group["lr"] == 0.1


def test_state_is_raw_and_the_file_is_the_modules_own(network):
    assert set(network.state_dict()) == {"network.text", "network.unet", "network.kept"}
    saved = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        network.network.text.mul_(3)
    network.load_state_dict(saved)
    assert torch.equal(network.network.text, torch.ones(2))
    tensors, metadata = network.export(dtype=torch.float16)
    assert set(tensors) == {"own.text", "own.unet", "own.kept"} and tensors["own.text"].dtype == torch.float16
    assert metadata == {"ss_network_module": "recorder", "ss_own": "yes"}


def test_a_file_is_loaded_once_and_not_again_when_it_is_in_already(tmp_path, calls, network):
    path = str(tmp_path / "net.safetensors")
    save_file({**network.file_tensors(None), "own.text": torch.full((2,), 5.0)}, path)
    network.load(path)
    assert calls == [("load_weights", (path,))]
    network.network.save_weights(path, None, {})
    network.load(path)
    assert len(calls) == 1
    save_file({"lora_unet_x.alpha": torch.ones(())}, path)
    with pytest.raises(UserError, match="none of its 1 tensors belongs to this network"):
        network.load(path)


def test_norms_are_limited_and_reported(network):
    network.network.apply_max_norm_regularization = lambda limit, device: (2, 0.5, limit)
    assert network.after_step(0.75) == {"norm/keys_scaled": 2.0, "norm/mean": 0.5, "norm/max": 0.75}
    assert network.after_step(None) == {}
    network.network.weight_norms = lambda: torch.tensor([1.0, 3.0])
    assert network.after_step(None) == {"norm/mean": 2.0, "norm/max": 3.0}


def test_class_settings_that_a_build_changes_are_put_back():
    class Changing(nn.Module):
        NAMES = ["a"]  # noqa: RUF012

    module = types.ModuleType("changing")
    module.Changing = Changing
    with untouched_settings(module):
        Changing.NAMES.append("b")
        Changing.EXTRA = True
    assert Changing.NAMES == ["a"] and not hasattr(Changing, "EXTRA")
    with pytest.raises(ValueError), untouched_settings(module):
        Changing.NAMES = []
        raise ValueError
    assert Changing.NAMES == ["a"]


TABLE = {"old_name": "new_name"}


def reads(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, named=1, **kwargs):
    for key, _ in list(kwargs.items()):
        if key in TABLE:
            kwargs[TABLE[key]] = 1
    kwargs.pop("popped", None)
    return kwargs.get("conv_dim"), kwargs["indexed"], "asked" in kwargs


def hands_on(*args, **kwargs):
    return dict(kwargs)


def test_arguments_that_a_module_never_reads_are_announced():
    module = module_of(reads)
    known = {"named", "popped", "conv_dim", "indexed", "asked", "old_name", "neuron_dropout"}
    assert known <= read_args(module)
    (sentence,) = unread_args(module, ["conv_dim", "con_dim", "old_name"])
    assert "does not read con_dim" in sentence and "did you mean conv_dim?" in sentence
    assert read_args(module_of(hands_on)) is None and unread_args(module_of(hands_on), ["x"]) == []


def test_modules_of_this_suite_are_not_foreign():
    from networks import lora

    assert not is_foreign(lora) and is_foreign(module_of(reads))

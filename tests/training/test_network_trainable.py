"""Which parts a network trains, at which rates, and what is no network module."""

import pytest

from library.config.cli import make_config
from library.errors import UserError
from library.training.trainables.network_parts import network_parts, part_rate
from library.training.trainables.networks import network_trainable

BOTH = ("te1", "te2")
ALL = (*BOTH, "unet")


@pytest.fixture
def config(tmp_path):
    """A configuration of a network's training with changes."""
    (tmp_path / "images" / "1_a").mkdir(parents=True)
    fixed = {
        "pretrained_model_name_or_path": "tiny",
        "train_data_dir": str(tmp_path / "images"),
        "resolution": 64,
        "output_dir": str(tmp_path),
        "network_module": "networks.lora",
        "learning_rate": 1e-3,
    }
    return lambda **changes: make_config("sdxl_train_network", **{**fixed, **changes})


@pytest.mark.parametrize(
    ("changes", "parts", "rates", "trains"),
    [
        ({}, ALL, (1e-3, 1e-3, 1e-3), ALL),
        ({"network_train_unet_only": True, "unet_lr": 2e-3}, ("unet",), (1e-3, 1e-3, 2e-3), ("unet",)),
        ({"network_train_text_encoder_only": True, "text_encoder_lr": [3e-3]}, BOTH, (3e-3, 3e-3, 1e-3), BOTH),
        ({"text_encoder_lr": [3e-3, 4e-3], "unet_lr": 0.0}, ALL, (3e-3, 4e-3, 0.0), BOTH),
    ],
)
@pytest.mark.parametrize("module", ["networks.lora", "lycoris.kohya"])
def test_parts_and_their_rates(config, module, changes, parts, rates, trains):
    cfg = config(network_module=module, **changes)
    assert network_parts(cfg) == parts
    assert tuple(part_rate(cfg, part) for part in ALL) == rates
    assert network_trainable(cfg).trains == set(trains)


def test_a_module_that_builds_no_networks_is_named(config):
    with pytest.raises(UserError, match=r"json\.tool has no function that builds a network"):
        network_trainable(config(network_module="json.tool"))

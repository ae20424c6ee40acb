"""Rules about networks that act in parts of a picture."""

from __future__ import annotations

from library.config.fields import GENERATOR
from library.config.regional_networks import num_regional
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem

_NETWORKS = ("mask_path", "network_weights", "network_merge", "network_merge_n_models")


@rule("network_regional_mask_max_color_codes", *_NETWORKS, runs=GENERATOR)
def colours_have_a_mask(cfg: RunConfig) -> list[Problem]:
    """What is said about the colours of a mask needs one, and networks."""
    name = "network_regional_mask_max_color_codes"
    if cfg.get(name) is None or num_regional(cfg):
        return []
    what = f"{name} cannot act: no network acts in parts of the picture"
    return conflict(cfg, what, name, fix="name mask_path and network_weights that are not merged, or remove it")


@rule("network_pre_calc", *_NETWORKS, runs=GENERATOR)
def regional_networks_are_live(cfg: RunConfig) -> list[Problem]:
    """What is added to the model's weights acts everywhere."""
    if not cfg.generate.network_pre_calc or not num_regional(cfg):
        return []
    what = "network_pre_calc adds networks to the model's weights, where they act everywhere, and mask_path says where"
    return conflict(cfg, what, "network_pre_calc", "mask_path", fix="remove one of them")

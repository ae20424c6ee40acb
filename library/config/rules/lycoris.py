"""Rules about algorithms of lycoris.kohya (4.1.3) that run and then do not do what they say."""

from __future__ import annotations

from library.config.fields import NETWORK
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem

# Presets with convolutions; a preset may also be a file, which is not looked into.
_WITH_CONVOLUTIONS = ("full", "unet-only", "unet-convblock-only")


@rule("network_module", "network_args", runs=NETWORK)
def lycoris_algorithms_work(cfg: RunConfig) -> list[Problem]:
    """Its dylora draws other ranks at every call and cannot be read back, its tlora has no convolutions."""
    args = cfg.network.network_kwargs()
    algorithm = args.get("algo", "").lower()
    if (cfg.network.network_module or "").split(".")[0] != "lycoris":
        return []
    if algorithm == "dylora":
        what = "dylora of LyCORIS does not read its weights back and draws with random ranks"
        return conflict(cfg, what, "network_args", "network_module", fix="use network_module networks.dylora")
    if algorithm == "tlora" and args.get("preset", "full") in _WITH_CONVOLUTIONS:
        what = "tlora of LyCORIS fails on convolutions, which are in its preset"
        return conflict(cfg, what, "network_args", fix="add preset=attn-mlp to network_args")
    return []

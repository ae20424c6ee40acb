"""Which trainable a network module needs: this suite's own, or the one that drives sd-scripts' interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.errors import UserError
from library.plugins import load_plugin
from library.training.trainables.foreign_network import ForeignNetworkTrainable
from library.training.trainables.network import NetworkTrainable
from library.training.trainables.pivotal import PivotalTrainable
from networks._foreign import is_foreign

if TYPE_CHECKING:
    from library.config.cli import RunConfig


def network_trainable(cfg: RunConfig) -> NetworkTrainable | PivotalTrainable | ForeignNetworkTrainable:
    """The trainable of `--network_module`; UserError for a module that does not exist or cannot build networks."""
    module = load_plugin("networks", cfg.network.network_module)
    if is_foreign(module):
        if cfg.pivotal.train_tokens:
            what = f"train_tokens cannot be used with {cfg.network.network_module}, a module of another program"
            raise UserError(what, "--train_tokens", "use networks.lora, or train the tokens by themselves")
        return ForeignNetworkTrainable(cfg, module)
    return PivotalTrainable(cfg) if cfg.pivotal.train_tokens else NetworkTrainable(cfg)

"""Trains new tokens together with a network (pivotal tuning): the two trainables, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.data.types import Batch
from library.io.bundled import bundle as bundled_names
from library.training.new_tokens import NewTokens
from library.training.trainable import Artifact, ParamGroup, Part
from library.training.trainables.network import NetworkTrainable

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.models.arch import SdxlArch
    from library.models.bundle import ModelBundle
    from networks._network import AdapterNetwork


class PivotalTrainable:
    """The `Trainable` of `sdxl_train_network.py --train_tokens`; `inner` is that of the network alone."""

    owns: frozenset[Part] = frozenset()
    needs: frozenset[str] = frozenset()
    may_skip_modules = False

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.inner = NetworkTrainable(cfg)
        self.tokens = NewTokens(cfg)
        self.loads = self.inner.loads
        self.trains: frozenset[Part] = self.inner.trains | {"te1", "te2"}

    @property
    def network(self) -> AdapterNetwork:
        """The network, once it is attached."""
        return self.inner.network

    def check_base(self, arch: SdxlArch) -> None:
        """UserError for embedding files of another base model."""
        self.tokens.check_base(arch)

    def prepare(self, bundle: ModelBundle, *, seed: int) -> None:
        """Merge `--base_weights` into the base, then add the tokens."""
        self.inner.prepare(bundle, seed=seed)
        self.tokens.install(bundle, seed=seed)

    def attach(self, bundle: ModelBundle) -> nn.Module:
        """Hook the network in; returns it together with the tokens' rows."""
        return nn.ModuleDict({"network": self.inner.attach(bundle), "tokens": self.tokens.rows})

    def param_groups(self) -> list[ParamGroup]:
        """The network's groups, then the tokens'."""
        rate = self.cfg.pivotal.token_lr
        rows: list[Tensor] = list(self.tokens.rows.parameters())
        tokens: ParamGroup = {
            "name": "tokens",
            "params": rows,
            "lr": self.cfg.optim.learning_rate if rate is None else rate,
        }
        return [*self.inner.param_groups(), tokens]

    def forward_scope(self, batch: Batch) -> AbstractContextManager[Any]:
        """Nothing to set."""
        return self.inner.forward_scope(batch)

    def after_step(self) -> Mapping[str, Tensor]:
        """What the network and the tokens do after a step."""
        return {**self.inner.after_step(), **self.tokens.after_step()}

    def metadata(self) -> dict[str, str]:
        """The network's."""
        return self.inner.metadata()

    def read_saved(self, bundle: ModelBundle, tensors: Mapping[str, Tensor], *, where: str) -> AdapterNetwork:
        """The network that a saved file describes; bundled tokens are no part of it."""
        return self.inner.read_saved(bundle, tensors, where=where)

    def export(self, dtype: torch.dtype | None) -> Artifact:
        """The network's file, with the tokens in it where `--bundle_tokens` asks for that."""
        artifact = self.inner.export(dtype)
        if not self.cfg.pivotal.bundle_tokens:
            return artifact
        return Artifact({**artifact.tensors, **bundled_names(self.tokens.state_of(dtype))}, artifact.metadata)

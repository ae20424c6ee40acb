"""Trains a ControlNet-LLLite on a frozen base."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.data.types import Batch
from library.errors import UserError
from library.inference.adapters import unet_root
from library.inference.controls import Control, Controls
from library.io.safetensors_file import TensorReader
from library.models import checkpoint
from library.models.assemble import empty_module
from library.training.trainable import Artifact, ParamGroup, Part
from networks import control_net_lllite
from networks._lllite_files import sizes_of

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.models.arch import SdxlArch
    from library.models.bundle import ModelBundle
    from networks.control_net_lllite import LLLiteNetwork


class LlliteTrainable:
    """The `Trainable` of `sdxl_train_control_net_lllite.py`; sizes and the file to start from are read from `cfg`.

    Raises UserError for `--network_weights` of another kind or of other sizes than are asked for.
    """

    trains: frozenset[Part] = frozenset({"unet"})
    needs: frozenset[str] = frozenset({"control_B3HW"})
    owns: frozenset[Part] = frozenset()
    loads = checkpoint.ALL_PARTS
    may_skip_modules = False
    modelspec_kind = "control-net-lllite"

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.sizes = (cfg.lllite.cond_emb_dim, cfg.lllite.network_dim)
        # Read now: a broken file is found before the model is loaded, and a network is small.
        self._weights: dict[str, Tensor] | None = None
        if cfg.lllite.network_weights:
            self._weights = _read(cfg.lllite.network_weights)
            self.sizes = self._sizes_in_file(cfg.lllite.network_weights)
        self.network: LLLiteNetwork

    def _sizes_in_file(self, path: str) -> tuple[int, int]:
        assert self._weights is not None
        found = sizes_of(self._weights, where=path)
        for name, asked, given in zip(("cond_emb_dim", "network_dim"), self.sizes, found, strict=True):
            if asked != given and self.cfg.is_given(name):
                raise UserError(
                    f"the file has {name} {given}, and {asked} is asked for ({self.cfg.provenance[name]})",
                    where=f"--network_weights {path}",
                    fix=f"leave {name} out: the file decides it",
                )
        return found

    def check_base(self, arch: SdxlArch) -> None:
        """UserError for `--network_weights` of another base model."""
        if self._weights is not None:
            control_net_lllite.check_base(
                unet_root(empty_module(arch, "unet")), self._weights, where=str(self.cfg.lllite.network_weights)
            )

    def prepare(self, bundle: ModelBundle, *, seed: int) -> None:
        """Nothing to change: the base stays as it is."""

    def attach(self, bundle: ModelBundle) -> nn.Module:
        """Build the network on the U-Net, load `--network_weights`, and hook it into the forward passes."""
        root = unet_root(bundle.unet)
        cond_emb_dim, mlp_dim = self.sizes
        self.network = control_net_lllite.create(
            root, cond_emb_dim=cond_emb_dim, mlp_dim=mlp_dim, dropout=self.cfg.lllite.network_dropout
        )
        if self._weights is not None:
            self.network.load(self._weights, where=str(self.cfg.lllite.network_weights))
            self._weights = None
        return self.network.attach()

    def param_groups(self) -> list[ParamGroup]:
        """One group: everything learns at `--learning_rate`."""
        return [{"name": "lllite", "params": list(self.network.parameters()), "lr": self.cfg.optim.learning_rate}]

    def forward_scope(self, batch: Batch) -> AbstractContextManager[Any]:
        """Embed the batch's condition images, once for all calls of the U-Net.

        They stay when the scope ends: gradient checkpointing computes the forward pass again in the backward pass.
        """
        assert batch.control_B3HW is not None, "the rules of the data set see to it that every image has a condition"
        self.network.set_condition(batch.control_B3HW)
        return nullcontext()

    def after_step(self) -> Mapping[str, Tensor]:
        """Nothing to repair after a step."""
        return {}

    def controls(self) -> Controls:
        """What sample pictures are drawn with."""
        return Controls([Control(self.network)])

    def metadata(self) -> dict[str, str]:
        """The network's sizes as its file names them."""
        return dict(self.network.facts)

    def export(self, dtype: torch.dtype | None) -> Artifact:
        """The network under sd-scripts' key names."""
        return Artifact(self.network.export(dtype=dtype), dict(self.network.facts))


def _read(path: str) -> dict[str, Tensor]:
    with TensorReader(Path(path)) as reader:
        return {name: reader.get(name) for name in reader}

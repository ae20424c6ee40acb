"""Trains an adapter network (the LoRA family) on a frozen base."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.data.types import Batch
from library.errors import UserError
from library.inference.adapters import adapter_roots, merge_base_weights
from library.io.safetensors_file import TensorReader
from library.models import checkpoint
from library.plugins import load_plugin
from library.training.trainable import Artifact, ParamGroup, Part
from library.training.trainables.network_parts import network_parts, part_rate

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.models.bundle import ModelBundle
    from networks._network import AdapterNetwork


class NetworkTrainable:
    """The `Trainable` of `sdxl_train_network.py`: which module, on which parts, at which rates is read from `cfg`.

    Raises UserError for a network module that does not exist or is not of this suite, and for wrong network_args.
    """

    needs: frozenset[str] = frozenset()
    owns: frozenset[Part] = frozenset()
    loads = checkpoint.ALL_PARTS
    may_skip_modules = False

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.module = load_plugin("networks", cfg.network.network_module)
        if not hasattr(self.module, "create_from_weights"):
            what = f"{cfg.network.network_module} has no function that builds a network"
            raise UserError(what, "--network_module", "use networks.lora, or another network module")
        able: tuple[Part, ...] = getattr(self.module, "PARTS", ("te1", "te2", "unet"))
        self.parts = tuple(part for part in network_parts(cfg) if part in able)
        self.trains = frozenset(part for part in self.parts if part_rate(cfg, part))
        # Read now: a broken file is found before the model is loaded, and a network is small.
        self._weights = _read(cfg.network.network_weights) if cfg.network.network_weights else None
        self._base_weights = [_read(path) for path in cfg.network.base_weights]
        self.network: AdapterNetwork

    def prepare(self, bundle: ModelBundle, *, seed: int) -> None:
        """Merge `--base_weights` into the base; what is cached and trained afterwards sees the result."""
        settings = self.cfg.network
        if self._base_weights:
            merge_base_weights(
                bundle, self._base_weights, names=settings.base_weights, muls=settings.base_weights_multiplier
            )
        self._base_weights = []

    def attach(self, bundle: ModelBundle) -> nn.Module:
        """Build the network on `bundle`, load `--network_weights`, and hook it into the forward passes."""
        settings = self.cfg.network
        roots = [root for root in adapter_roots(bundle) if root.part in self.parts]
        if settings.dim_from_weights:
            self.network = self.module.create_from_weights(
                roots,
                self._weights,
                where=settings.network_weights,
                dropout=settings.network_dropout,
                args=settings.network_kwargs(),
            )
        else:
            self.network = self.module.create(
                roots,
                dim=settings.network_dim,
                alpha=settings.network_alpha,
                dropout=settings.network_dropout,
                args=settings.network_kwargs(),
            )
            if self._weights is not None:
                self.network.load(self._weights, where=settings.network_weights)
        self._weights = None
        self.network.attach()
        return self.network

    def param_groups(self) -> list[ParamGroup]:
        """Text encoder groups, then the U-Net's; a part with rate 0 has none."""
        return self.network.param_groups(
            unet_lr=part_rate(self.cfg, "unet"),
            text_encoder_lrs=[part_rate(self.cfg, "te1"), part_rate(self.cfg, "te2")],
            default_lr=None,
        )

    def forward_scope(self, batch: Batch) -> AbstractContextManager[Any]:
        """Nothing to set: adapters act by themselves."""
        return nullcontext()

    def after_step(self) -> Mapping[str, Tensor]:
        """Limit the norms of what the modules add (`--scale_weight_norms`); how many were shrunk, mean and largest."""
        limit = self.cfg.network.scale_weight_norms
        return self.network.limit_norms(limit) if limit else {}

    def metadata(self) -> dict[str, str]:
        """The network's dims and arguments as its file names them."""
        return dict(self.network.facts)

    def read_saved(self, bundle: ModelBundle, tensors: Mapping[str, Tensor], *, where: str) -> AdapterNetwork:
        """The network that a saved file describes, on the same base, not attached."""
        roots = [root for root in adapter_roots(bundle) if root.part in self.parts]
        return self.module.create_from_weights(roots, tensors, where=where)

    def export(self, dtype: torch.dtype | None) -> Artifact:
        """The network under sd-scripts' key names."""
        return Artifact(*self.network.export(dtype=dtype))


def _read(path: str) -> dict[str, Tensor]:
    with TensorReader(Path(path)) as reader:
        return {name: reader.get(name) for name in reader}

"""Trains a network of a third-party module with sd-scripts' interface, such as lycoris.kohya, on a frozen base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.data.types import Batch
from library.errors import UserError
from library.inference.foreign import host_of
from library.log import get_logger
from library.models import checkpoint
from library.training.hooks import Event, Hook, View
from library.training.trainable import Artifact, ParamGroup, Part
from library.training.trainables.network_parts import network_parts, part_rate
from networks import _foreign
from networks._foreign import ForeignNetwork
from networks._foreign_args import unread_args

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.models.bundle import ModelBundle

log = get_logger(__name__)


class ForeignNetworkTrainable:
    """The `Trainable` of `sdxl_train_network.py` for modules that are not of this suite.

    The module's calls come in sd-scripts' order. Three things are different here: gradients are averaged by DDP inside
    the one wrapped step, where sd-scripts does it by hand; `prepare_grad_etc` comes before the step is wrapped; and
    gradients are gone when the norms for the log are asked for, so `update_grad_norms` is not called.
    """

    needs: frozenset[str] = frozenset()
    owns: frozenset[Part] = frozenset()
    loads = checkpoint.ALL_PARTS
    # Whether every parameter takes part in every pass is the module's affair: the last layer of the first text
    # encoder, which SDXL does not use, has adapters too, and module dropout skips some.
    may_skip_modules = True

    def __init__(self, cfg: RunConfig, module: ModuleType) -> None:
        self.cfg, self.module = cfg, module
        settings = cfg.network
        self._parts = network_parts(cfg)
        self.trains = frozenset(part for part in self._parts if part_rate(cfg, part))
        if settings.network_weights and not Path(settings.network_weights).is_file():
            raise UserError(
                "there is no such network file", f"--network_weights {settings.network_weights}", "check the path"
            )
        for sentence in unread_args(module, settings.network_kwargs()):
            log.warning(sentence)
        self.network: ForeignNetwork
        self._begun = False

    def prepare(self, bundle: ModelBundle, *, seed: int) -> None:
        """Nothing to change: the base stays as it is."""

    def attach(self, bundle: ModelBundle) -> nn.Module:
        """Let the module build its network on `bundle`, apply it and load `--network_weights`."""
        cfg, settings = self.cfg, self.cfg.network
        host, weights = host_of(bundle), settings.network_weights
        if settings.dim_from_weights:
            assert weights is not None, "the settings are checked before"
            self.network = _foreign.create_from_weights(self.module, host, weights)
        else:
            self.network = _foreign.create(
                self.module,
                host,
                dim=settings.network_dim,
                alpha=settings.network_alpha,
                dropout=settings.network_dropout,
                args=settings.network_kwargs(),
            )
        inner = self.network.network
        if hasattr(inner, "prepare_network"):
            inner.prepare_network(cfg)
        self.network.apply(text_encoders="te1" in self._parts, unet="unet" in self._parts)
        if weights:
            self.network.load(weights)
        if cfg.loop.gradient_checkpointing and hasattr(inner, "enable_gradient_checkpointing"):
            inner.enable_gradient_checkpointing()
        return self.network

    def param_groups(self) -> list[ParamGroup]:
        """The module's own groups, named as it describes them."""
        settings, default = self.cfg.network, self.cfg.optim.learning_rate
        groups = self.network.param_groups(
            text_encoder_lrs=list(settings.text_encoder_lr), unet_lr=settings.unet_lr, default_lr=default
        )
        return groups  # type: ignore[return-value]

    @contextmanager
    def forward_scope(self, batch: Batch) -> Iterator[None]:
        """The module hears of every micro-batch that is trained on, not of validation or of the timing passes."""
        if self._begun and self.network.training:
            self.network.tell("on_step_start")
        yield

    def hooks(self) -> list[Hook]:
        """The module hears of every epoch that begins."""
        return [self._epochs]

    def _epochs(self, event: Event, view: View) -> None:
        goes_on = view.progress.global_step < view.total_steps and not view.stop
        if event in (Event.START, Event.EPOCH) and goes_on:
            self._begun = True
            self.network.tell("on_epoch_start")

    def after_step(self) -> Mapping[str, Tensor]:
        """The module limits its norms, if that is asked for, and says how large they are."""
        return self.network.after_step(getattr(self.cfg.network, "scale_weight_norms", None))

    def metadata(self) -> dict[str, str]:
        """The network's dims and arguments as given."""
        return dict(self.network.facts)

    def export(self, dtype: torch.dtype | None) -> Artifact:
        """What the module's own `save_weights` writes."""
        return Artifact(*self.network.export(dtype=dtype))

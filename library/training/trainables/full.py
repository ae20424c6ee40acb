"""Trains the weights of the model itself: the U-Net, and with `--train_text_encoder` the text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from library.config.block_weights import NUM_U_NET_BLOCKS, u_net_block
from library.data.types import Batch
from library.models import checkpoint, scratch
from library.models.keymaps.unet import diffusers_to_sai
from library.training.trainable import PART_MODULES, ParamGroup, Part

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.models.bundle import ModelBundle

GROUP_NAMES: dict[Part, str] = {"unet": "unet", "te1": "text_encoder1", "te2": "text_encoder2"}


class FullTrainable:
    """The `Trainable` of `sdxl_train.py`; which parts train, and at which rates, is read from `cfg`.

    A part or a block of the U-Net with rate 0 is frozen: its parameters ask for no gradient, so the backward pass
    ends where nothing before it trains. Of text encoder 1 the last layer and the final norm never train: SDXL reads
    the layer before them. Source: spec block_lr.md section 1, flags.md (sdxl_train.py).
    """

    needs: frozenset[str] = frozenset()
    may_skip_modules = False

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.rates: dict[Part, float] = {part: rate for part, rate in _rates(cfg).items() if rate}
        self.trains = self.owns = frozenset(self.rates)
        # A U-Net that is trained from scratch need not be in the checkpoint.
        self.loads = tuple(name for name in checkpoint.ALL_PARTS if name != "unet" or not cfg.finetune.unet_config)
        self.bundle: ModelBundle

    def prepare(self, bundle: ModelBundle, *, seed: int) -> None:
        """Put a new U-Net into `bundle` where `--unet_config` asks for one; the same for one `seed` on every rank."""
        if self.cfg.finetune.unet_config:
            scratch.new_unet(bundle, Path(self.cfg.finetune.unet_config), seed=seed)

    def attach(self, bundle: ModelBundle) -> nn.Module:
        """Let gradients flow into what trains; returns the trained parts under their names in `ModelBundle`."""
        self.bundle = bundle
        for part in self.rates:
            for parameter in self._parameters(part):
                parameter.requires_grad_(True)
        names = [name for part, name in PART_MODULES.items() if part in self.owns]
        return nn.ModuleDict({name: getattr(bundle, name) for name in names})

    def _parameters(self, part: Part) -> Iterator[Tensor]:
        """The parameters of a part that get gradients."""
        if part == "unet":
            for _, _, parameters in self._unet_groups():
                yield from parameters
            return
        module = getattr(self.bundle, PART_MODULES[part])
        unused = _unused(module) if part == "te1" else frozenset()
        yield from (parameter for parameter in module.parameters() if id(parameter) not in unused)

    def _unet_groups(self) -> Iterator[tuple[str, float, list[Tensor]]]:
        """(name, rate, parameters) of the U-Net's groups: one, or one per block whose rate is above 0."""
        named = self.bundle.unet.named_parameters()
        if not self.cfg.finetune.block_lr:
            yield GROUP_NAMES["unet"], self.rates["unet"], [parameter for _, parameter in named]
            return
        blocks: list[list[Tensor]] = [[] for _ in range(NUM_U_NET_BLOCKS)]
        for name, parameter in named:
            blocks[u_net_block(diffusers_to_sai(name))].append(parameter)
        for index, (rate, parameters) in enumerate(zip(self.cfg.finetune.block_lr, blocks, strict=True)):
            if rate and parameters:
                yield f"block{index}", rate, parameters

    def param_groups(self) -> list[ParamGroup]:
        """The U-Net's group, or one per block that trains, then the text encoders'."""
        groups: list[ParamGroup] = []
        if "unet" in self.rates:
            groups += [{"name": name, "params": params, "lr": rate} for name, rate, params in self._unet_groups()]
        for part in ("te1", "te2"):
            if part in self.rates:
                params = list(self._parameters(part))
                groups.append({"name": GROUP_NAMES[part], "params": params, "lr": self.rates[part]})
        return groups

    def forward_scope(self, batch: Batch) -> AbstractContextManager[Any]:
        """Nothing to set."""
        return nullcontext()

    def after_step(self) -> Mapping[str, Tensor]:
        """Nothing to repair after a step."""
        return {}


def _rates(cfg: RunConfig) -> dict[Part, float]:
    """The rate of each part, 0 for one that does not train; the U-Net's is 0 when all its blocks' are."""
    rate, finetune = cfg.optim.learning_rate, cfg.finetune
    blocks = finetune.block_lr
    rates: dict[Part, float] = {"unet": rate if not blocks or any(blocks) else 0.0}
    own = {"te1": finetune.learning_rate_te1, "te2": finetune.learning_rate_te2}
    for part, value in own.items():
        rates[part] = (rate if value is None else value) if finetune.train_text_encoder else 0.0
    return rates


def _unused(text_encoder: nn.Module) -> frozenset[int]:
    """Ids of the parameters behind the layer that is read: the last transformer layer and the final norm."""
    inner = getattr(text_encoder, "text_model", text_encoder)
    behind = (inner.encoder.layers[-1], inner.final_layer_norm)
    return frozenset(id(parameter) for module in behind for parameter in module.parameters())

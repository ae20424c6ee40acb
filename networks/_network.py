"""A set of adapters on one or more models: names, parameter groups, files, merging."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.log import get_logger
from networks._adapter import Adapter
from networks._block_weights import block_factor
from networks._files import LORA, FileFormat, check_fit, group_tensors
from networks._groups import RatePlan, part_groups
from networks._keys import PARTS, Target

logger = get_logger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What a load did: numbers of modules filled, and the names that did not meet."""

    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.loaded} modules loaded"
        for count, what in ((len(self.missing), "not in the file"), (len(self.unexpected), "only in the file")):
            text += f", {count} {what}" if count else ""
        return text


class AdapterNetwork(nn.Module):
    """Adapters by name. Holds their parameters only; the adapted models stay outside.

    `adapters` maps sd-scripts' module name to the adapter, `targets` says where each sits. `facts` is what the
    file's metadata tells about the network (ss_network_*), `form` what its tensors are called. `rates`: what deviates
    from one learning rate for a part.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[Target, Adapter]],
        *,
        facts: Mapping[str, str],
        multiplier: float,
        form: FileFormat = LORA,
        rates: RatePlan | None = None,
    ) -> None:
        super().__init__()
        pairs = list(pairs)
        self.adapters = nn.ModuleDict({target.name: adapter for target, adapter in pairs})
        assert len(self.adapters) == len(pairs), "two modules have the same name"
        self.targets = {target.name: target for target, _ in pairs}
        self.facts = dict(facts)
        self.form = form
        self.rates = rates or RatePlan()
        self.attached = False
        self.block_weights: tuple[float, ...] = ()
        self._backup: dict[str, Tensor] | None = None
        self.set_multiplier(multiplier)
        for target, adapter in pairs:
            if target.unused:
                adapter.requires_grad_(False)

    def count(self, part: str) -> int:
        """How many adapters sit on a part ("te1", "te2" or "unet")."""
        return sum(target.part == part for target in self.targets.values())

    def attach(self) -> "AdapterNetwork":
        """Put every adapter into its module's forward."""
        assert not self.attached and self._backup is None
        for adapter in self.adapters.values():
            adapter.attach()
        self.attached = True
        return self

    def detach(self) -> None:
        """Take every adapter out; the models are as they were."""
        assert self.attached
        for adapter in self.adapters.values():
            adapter.detach()
        self.attached = False

    def set_multiplier(self, multiplier: float) -> None:
        """Scale every adapter's addition; 0 gives the base model exactly."""
        self.multiplier = multiplier
        for name, adapter in self.adapters.items():
            adapter.multiplier = multiplier * block_factor(name, self.block_weights)

    def set_block_weights(self, weights: tuple[float, ...]) -> None:
        """Give each block a weight of its own beside the multiplier; see `block_factor`."""
        self.block_weights = weights
        self.set_multiplier(self.multiplier)

    def param_groups(
        self, unet_lr: float | None, text_encoder_lrs: Sequence[float], default_lr: float | None
    ) -> list[dict[str, object]]:
        """Optimizer groups `{"name", "params", "lr"}` per part: textencoder1, textencoder2, unet.

        LoRA+ adds a twin "… plus", block weights make unet_block{i} of unet, a rule with a rate makes "… rule{n}".

        text_encoder_lrs: none (default_lr for both), one for both, or one each. A missing rate is default_lr. A
        part whose rate is 0 or None is frozen here and gets no group; UserError when nothing is left.
        """
        if len(text_encoder_lrs) > 2:
            raise UserError(f"text_encoder_lr has {len(text_encoder_lrs)} values", "text_encoder_lr", "give 1 or 2")
        first, second = (*text_encoder_lrs, *text_encoder_lrs)[:2] if text_encoder_lrs else (None, None)
        rates = {"te1": first, "te2": second, "unet": unet_lr}
        groups: list[dict[str, object]] = []
        for part in PARTS:
            rate = rates[part] if rates[part] is not None else default_lr
            adapters = {name: self.adapters[name] for name, target in self.targets.items() if target.part == part}
            groups += part_groups(part, adapters, rate=rate or 0.0, plan=self.rates)
        if not groups:
            raise UserError(
                "no part of the network has a learning rate above 0, so nothing would train",
                "learning_rate, unet_lr, text_encoder_lr",
                "set learning_rate, or the rate of the part that shall train",
            )
        return groups

    def limit_norms(self, limit: float) -> dict[str, Tensor]:
        """Shrink every module's addition to a Frobenius norm of at most `limit` (--scale_weight_norms).

        Returns 0-d tensors to log, under sd-scripts' names: how many modules were shrunk, mean and largest norm.
        """
        found = [a.limit_norm(limit) for a in self.adapters.values() if any(p.requires_grad for p in a.parameters())]
        done = [pair for pair in found if pair is not None]
        if not done:
            return {}
        norms, shrunk = (torch.stack(column) for column in zip(*done, strict=True))
        return {
            "max_norm/keys_scaled": shrunk.sum(),
            "max_norm/average_key_norm": norms.mean(),
            "max_norm/max_key_norm": norms.max(),
        }

    def export(self, *, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors, metadata) of the network's file: sd-scripts' keys on the CPU, alpha always 0-d float32."""
        tensors = {}
        for name, adapter in self.adapters.items():
            for key, value in adapter.state_dict().items():
                keep = dtype is None or key in adapter.float32_tensors
                tensors[f"{name}.{key}"] = value.detach().to("cpu", value.dtype if keep else dtype).clone().contiguous()
        return tensors, dict(self.facts)

    def load(self, tensors: Mapping[str, Tensor], *, where: str = "network_weights") -> LoadReport:
        """Fill the adapters from a file's tensors; sd-scripts' and this library's module names are understood.

        Modules that only one side has are reported, not an error; a file of which nothing fits, or whose shapes
        differ, is a UserError.
        """
        modules = group_tensors(tensors, self.targets.values(), where=where, form=self.form)
        known = {name: values for name, values in modules.items() if name in self.adapters}
        report = LoadReport(
            loaded=len(known),
            missing=tuple(name for name in self.adapters if name not in known),
            unexpected=tuple(name for name in modules if name not in known),
        )
        check_fit(self.adapters, known, where=where)
        for name, values in known.items():
            self.adapters[name].load_file_tensors(values)
        level = logger.warning if report.missing or report.unexpected else logger.info
        level("%s: %s", where, report)
        return report

    @torch.no_grad()
    def merge(self, multiplier: float | None = None, *, backup: bool = True) -> None:
        """Add multiplier * delta to the base weights (computed in float32). With backup, `unmerge` can undo it."""
        assert not self.attached, "a network that is attached would act twice when merged"
        assert self._backup is None, "the network is merged already"
        scale = self.multiplier if multiplier is None else multiplier
        if backup:
            self._backup = {name: a.base.weight.detach().to("cpu", copy=True) for name, a in self.adapters.items()}
        for name, adapter in self.adapters.items():
            weight = adapter.base.weight
            delta = adapter.delta_weight().to(weight.device)
            weight.copy_(weight.float() + scale * block_factor(name, self.block_weights) * delta)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weights back bit by bit as they were before `merge`."""
        assert self._backup is not None, "nothing to undo: not merged, or merged without backup"
        for name, adapter in self.adapters.items():
            adapter.base.weight.copy_(self._backup[name])
        self._backup = None

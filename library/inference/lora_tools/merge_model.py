"""Merging networks into a checkpoint: W + sum of ratio * block weight * delta(W), written while it is computed."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from types import ModuleType

import torch
from torch import Tensor, nn

from library.data.progress import progress_bar
from library.errors import UserError
from library.inference.lora_tools.files import LoraFile, named_twice, refuse_foreign_part, stem_of
from library.inference.lora_tools.model import StreamedModel
from library.inference.lora_tools.report import ErrorSums
from library.io.bundled import bundled_keys
from library.io.checkpoint_file import read_checkpoint
from library.io.modelspec import modelspec_metadata
from library.io.safetensors_file import ComputedTensors, TensorSource, save
from library.log import get_logger
from library.models import prediction
from library.models.arch import PARTS, PREFIXES, Part, facts_metadata
from library.models.opened import LOGIT_SCALE
from library.models.prediction import Stated
from library.models.tensors import joined
from library.plugins import load_plugin
from networks._block_weights import block_factor
from networks._files import check_module, format_of
from networks._keys import AdapterRoot, Target

log = get_logger(__name__)

# A tail of a tensor name -> the network module whose files have it; all others are LoRA's.
_KINDS = {"dora_scale": "networks.dora", "oft_blocks": "networks.oft"}
_SHOWN = 3


@dataclass(frozen=True)
class Source:
    """One network to merge: file, ratio, and weights of the blocks as `weight_of_block` reads them."""

    path: str
    ratio: float
    blocks: tuple[float, ...]


def merge_into_checkpoint(
    model_name: str,
    sources: Sequence[Source],
    save_to: str,
    *,
    precision: torch.dtype,
    save_dtype: torch.dtype | None,
    with_metadata: bool,
) -> None:
    """Write the checkpoint `model_name` with all `sources` merged, as a single file in sd-scripts' layout.

    The sum is made in `precision` and stored in save_dtype (None: precision). All changes are those of the original
    weights, so the order of the sources does not matter and the result is what the networks give when applied together.
    Raises UserError where files do not fit, before anything is computed, and when nothing fits.
    """
    with ExitStack() as stack:
        networks = [_OpenNetwork(source, stack) for source in sources]  # first, because that is quick
        model = StreamedModel(model_name, stack)
        targets = {target.name: target for target in model.targets()}
        for network in networks:
            network.find_in(targets)
        dtype = save_dtype or precision
        merged = {part: _Merged(model, part, networks, precision=precision, dtype=dtype) for part in PARTS}
        whole = _SingleFile(model, merged, dtype)
        with progress_bar(len(whole), title="merge", unit="tensor") as bar:
            whole.told = bar.update
            save(whole, save_to, _header(model, sources, save_to, with_metadata), dtype=dtype, checked=True)
    for line in ErrorSums.table([part.errors for part in merged.values()], "rounding to the stored numbers"):
        print(line)
    log.info("written: %s", save_to)


class _OpenNetwork:
    """A network file; its kind, names and values are checked when it is opened. UserError for what is broken."""

    def __init__(self, source: Source, stack: ExitStack) -> None:
        self.source, self.where = source, source.path
        self._tensors: TensorSource = stack.enter_context(read_checkpoint(os.path.expanduser(source.path), mmap=False))
        tails = {key.partition(".")[2] for key in self._tensors}
        name = next((module for tail, module in _KINDS.items() if tail in tails), "networks.lora")
        self.kind: ModuleType = load_plugin("networks", name)
        self.keys: dict[str, dict[str, str]] = {}  # target -> tail -> key
        self._lora = LoraFile(source.path, stack).renamed() if name == "networks.lora" else {}
        tokens = frozenset(bundled_keys(self._tensors))
        for key in (key for key in self._tensors if key not in tokens):
            refuse_foreign_part(key.partition(".")[0], self.where)
            if not torch.isfinite(self._tensors[key].float()).all():
                raise UserError(f"{key} holds NaN or infinity", self.where, "the file is broken: use an earlier save")

    def find_in(self, targets: Mapping[str, Target]) -> None:
        """Find the modules in the model; UserError for other widths, names given twice and when nothing is there."""
        self._check_widths(targets)
        ours = {spelled: name for name, target in targets.items() for spelled in (name, target.alias)}
        ours |= {spelled.replace("lora_", "oft_", 1): name for spelled, name in ours.items()}
        spelled_as: dict[str, str] = {}
        unknown: list[str] = []
        for key in self._tensors:
            module, _, tail = key.partition(".")
            if module not in ours:
                unknown += [] if module in unknown else [module]
                continue
            name = ours[module]
            if spelled_as.setdefault(name, module) != module:
                raise named_twice(name, spelled_as[name], module, self.where)
            self.keys.setdefault(name, {})[tail] = key
        if not self.keys:
            raise UserError(
                f"none of its {len(unknown)} modules is in this model (the first: {unknown[0]})",
                self.where,
                "choose a network made for this kind of model",
            )
        if not self._lora:
            form = format_of(self._tensors)
            for name, tails in self.keys.items():
                values = {tail: self._tensors[key] for tail, key in tails.items()}
                check_module(values, replace(targets[name], name=spelled_as[name]), where=self.where, form=form)
        if unknown:
            shown = ", ".join(unknown[:_SHOWN])
            log.warning("%s: %d modules are not in this model and are left out (%s)", self.where, len(unknown), shown)

    def _check_widths(self, targets: Mapping[str, Target]) -> None:
        for name, module in self._lora.items():
            wanted = tuple(targets[name].module.weight.shape) if name in targets else module.shape
            if module.shape != wanted:
                raise UserError(
                    f"{module.name} is for a weight of shape {module.shape}, this model's is {wanted}",
                    self.where,
                    "choose a LoRA made for SDXL models of this size",
                )

    def delta(self, model: StreamedModel, target: Target, weight: Tensor) -> Tensor | None:
        """ratio * block weight * change of the float32 `weight`; None where this network has nothing to add."""
        factor = self.source.ratio * block_factor(target.name, self.source.blocks)
        keys = self.keys.get(target.name)
        if keys is None or factor == 0:
            return None
        tensors = {key: self._tensors[key] for key in keys.values()}
        if self._lora and "alpha" not in keys:  # told when the file was opened
            down = keys["lora_down.weight"]
            tensors[f"{down.partition('.')[0]}.alpha"] = torch.tensor(float(len(tensors[down])))
        root = _lone_root(model.root_of(target), model.path_of(target), target.module, weight)
        network = self.kind.create_from_weights([root], tensors, where=self.where)
        return factor * sum(adapter.delta_weight() for adapter in network.adapters.values())


def _lone_root(root: AdapterRoot, path: str, module: nn.Module, weight: Tensor) -> AdapterRoot:
    """A root that holds this one module at its path, with a real weight, so that any kind can be built on it."""
    real = copy.deepcopy(module)
    real.weight = nn.Parameter(weight, requires_grad=False)
    real.bias = None
    tree: nn.Module = real
    for piece in reversed(path.split(".")):
        parent = nn.Module()
        parent.add_module(piece, tree)
        tree = parent
    return AdapterRoot(root.part, root.prefix, tree, root.rename)


class _Merged(Mapping[str, Tensor]):
    """A part's tensors under library names, merged when they are read."""

    def __init__(
        self,
        model: StreamedModel,
        part: Part,
        networks: Sequence[_OpenNetwork],
        *,
        precision: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._networks, self._precision, self._dtype = model, networks, precision, dtype
        self._tensors = model.tensors[part]
        self._targets = {
            model.path_of(target) + ".weight": target for target in model.targets() if model.part_of(target) == part
        }
        self.errors = ErrorSums(part)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        target = self._targets.get(name)
        if target is None or not tensor.is_floating_point():
            return tensor
        weight = tensor.to(self._precision).float()
        found = [network.delta(self._model, target, weight) for network in self._networks]
        deltas = [delta for delta in found if delta is not None]
        if not deltas:
            return tensor
        delta = torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0]
        merged = (weight + delta).to(self._precision)
        error = merged.to(self._dtype).float() - weight
        error -= delta
        self.errors.add(delta, error)
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


class _SingleFile(ComputedTensors):
    """The merged model under the names of a single file; every tensor is made once, when it is written."""

    def __init__(self, model: StreamedModel, merged: Mapping[Part, _Merged], dtype: torch.dtype) -> None:
        outlines: list[tuple[str, Mapping[str, Tensor]]] = []
        values: list[tuple[str, Mapping[str, Tensor]]] = []
        for part, view in merged.items():
            keymap = model.keymap(part)
            meta = {key: tensor.to("meta", dtype) for key, tensor in model.modules[part].state_dict().items()}
            outlines.append((PREFIXES[part], keymap.view(meta, reverse=True)))
            values.append((PREFIXES[part], keymap.view(view, reverse=True)))
        rest: dict[str, Tensor] = dict(prediction.markers_of(*_prediction(model.opened.stated)))
        scale = model.opened.logit_scale()
        if scale is not None:
            rest[PREFIXES["text_encoder_2"] + LOGIT_SCALE] = scale
        self._outlines = joined([*outlines, ("", {key: value.to("meta") for key, value in rest.items()})])
        self._values = joined([*values, ("", rest)])
        self.told: Callable[[int], object] = lambda count: None

    def outline(self, name: str) -> Tensor:
        return self._outlines[name]

    def __getitem__(self, name: str) -> Tensor:
        self.told(1)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _prediction(stated: Stated):
    """Prediction type and schedule, as loading a bundle decides them."""
    kind = stated.prediction_type or "epsilon"
    zero_snr = stated.zero_terminal_snr and kind != "rectified_flow"
    return kind, prediction.schedule_for(kind, zero_terminal_snr=zero_snr, flow_shift=stated.flow_shift)


def _header(model: StreamedModel, sources: Sequence[Source], save_to: str, with_metadata: bool) -> dict[str, str]:
    kind, schedule = _prediction(model.opened.stated)
    header = {"format": "pt", **facts_metadata(model.arch.facts)}
    if with_metadata:
        titles = [model.opened.metadata.get("modelspec.title") or stem_of(model.where)]
        titles += [stem_of(source.path) for source in sources]
        header |= modelspec_metadata(
            "checkpoint",
            created=datetime.fromtimestamp(time.time()),
            title=stem_of(save_to),
            fields={"merged_from": ", ".join(titles)},
        )
    return header | prediction.header_of(kind, schedule)

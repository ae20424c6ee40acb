"""Several networks at once in generation: merged into the model, applied live, or added before each batch.

W = W0 + sum_i m_i b_i D_i(W0): every network's change D starts from the model's own weights W0, with the strength m of
the network and the weight b of the block, so the order of the networks is of no account. Source: gen_img.md §13 for
the options, block_lr.md §3 for the blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, overload

import torch
from torch import Tensor, nn

from library.config.block_weights import parse_block_weights
from library.errors import UserError
from library.inference.adapters import read_network, set_strengths
from library.io.safetensors_file import TensorReader
from library.log import get_logger
from library.models.bundle import ModelBundle
from networks._network import AdapterNetwork

if TYPE_CHECKING:
    from library.config.generate import GenerateOptions
    from library.inference.request import GenRequest

logger = get_logger(__name__)

Change = Callable[[], dict[str, Tensor]]


class Network(Protocol):
    """What generation knows of a network, this suite's own or a third-party one."""

    multiplier: float

    def set_multiplier(self, multiplier: float) -> None:
        """Scale what it adds; 0 switches it off."""
        ...

    def set_block_weights(self, weights: tuple[float, ...]) -> None:
        """Give each block a weight of its own beside the multiplier."""
        ...

    def count(self, part: str) -> int:
        """How many layers of a part ("te1", "te2" or "unet") it adapts."""
        ...

    def attach(self) -> Any:
        """Hook it into the forward passes; returns itself."""
        ...


@dataclass
class Weights:
    """The model's own weights where networks have been added; `restore` puts them back bit by bit."""

    originals: list[tuple[Tensor, Tensor]]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what was added."""
        for weight, original in self.originals:
            weight.copy_(original)
        self.originals = []


@torch.no_grad()
def add_to_model(networks: Sequence[Network], *, backup: bool) -> Weights:
    """Add networks that are not attached to the model's weights, at the strengths they have.

    Sums are float32, one layer at a time, and rounded once to the layer's dtype. A network of strength 0 takes no
    part. With `backup`, copies of the weights are kept on the CPU.
    """
    layers: dict[int, tuple[nn.Module, list[Change]]] = {}
    for network in networks:
        if network.multiplier != 0:
            for layer, change in changes(network):
                layers.setdefault(id(layer), (layer, []))[1].append(change)
    kept: list[tuple[Tensor, Tensor]] = []
    for layer, found in layers.values():
        sums: dict[str, Tensor] = {}
        for change in found:
            for name, value in change().items():
                sums[name] = sums[name] + value if name in sums else value
        for name, value in sums.items():
            weight = cast(Tensor, getattr(layer, name))
            if backup:
                kept.append((weight, weight.detach().to("cpu", copy=True)))
            weight.copy_(weight.float() + value.to(weight.device))
    return Weights(kept)


def changes(network: Any) -> Iterator[tuple[nn.Module, Change]]:
    """Each layer that a network adapts, with a function of what it adds to the layer's parameters (float32)."""
    if not isinstance(network, AdapterNetwork):
        yield from network.changes()
        return
    for adapter in network.adapters.values():
        yield adapter.base, _delta(adapter)


def _delta(adapter: Any) -> Change:
    return lambda: {"weight": adapter.multiplier * adapter.delta_weight()} if adapter.multiplier else {}


class PreAdded(Sequence[Any]):
    """Networks that are added to the model's weights instead of acting in its forward passes.

    `refresh` does so anew, from the model's own weights, after strengths have changed.
    """

    def __init__(self, networks: Sequence[Any]) -> None:
        self._networks = list(networks)
        self._weights = Weights([])
        self.refresh()

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._networks[index]

    def __len__(self) -> int:
        return len(self._networks)

    def refresh(self) -> None:
        """Put the model's own weights back and add the networks as strong as they are now."""
        self._weights.restore()
        self._weights = add_to_model(self._networks, backup=True)


@contextmanager
def at_strengths(networks: Sequence[Any], muls: Sequence[float] | None) -> Iterator[None]:
    """Networks at other strengths, afterwards, whatever happens, back at their own; None or () changes nothing."""
    before = [network.multiplier for network in networks]
    if not before or not muls:
        yield
        return
    try:
        _set(networks, muls)
        yield
    finally:
        _set(networks, before)


def _set(networks: Sequence[Any], strengths: Sequence[float]) -> None:
    set_strengths(networks, strengths)
    if isinstance(networks, PreAdded):
        networks.refresh()


def load_set(bundle: ModelBundle, options: GenerateOptions) -> Sequence[Any]:
    """The networks that the options name, on the model; returns those whose strength a prompt can change, in order.

    The first network_merge_n_models, or all with network_merge, are merged for good. Raises UserError for files that
    are missing, broken or made for another model.
    """
    num_merged = len(options.network_weights) if options.network_merge else options.network_merge_n_models or 0
    networks = []
    for index, (module, path) in enumerate(zip(options.network_module, options.network_weights, strict=True)):
        strength = options.network_mul[index] if index < len(options.network_mul) else 1.0
        if options.network_show_meta:
            _show_metadata(Path(path))
        network = read_network(bundle, module, Path(path), strength, options.network_kwargs(index))
        if index < len(options.network_block_weights):
            network.set_block_weights(parse_block_weights(options.network_block_weights[index]))
        counts = ", ".join(f"{network.count(part)} in {part}" for part in ("te1", "te2", "unet") if network.count(part))
        how = (
            "merging" if index < num_merged else "adding before each batch" if options.network_pre_calc else "applying"
        )
        logger.info("%s %s x %g (%s)", how, path, strength, counts)
        networks.append(network)
    if num_merged:
        add_to_model(networks[:num_merged], backup=False)
    live = networks[num_merged:]
    if options.network_pre_calc:
        return PreAdded(live)
    return [network.attach() for network in live]


def check_strengths(requests: Sequence[GenRequest], networks: Sequence[Any], *, merged: bool) -> None:
    """Raise UserError for an `--am` of a prompt that finds no network, or fewer than it has values."""
    for request in requests:
        if not request.network_muls:
            continue
        if not networks:
            reason = "they are merged into the model" if merged else "no networks are loaded"
            fix = "remove --am" + (" or network_merge" if merged else "")
            raise UserError(f"--am has nothing to act on: {reason}", request.raw, fix)
        if len(request.network_muls) > len(networks):
            raise UserError(
                f"--am has {len(request.network_muls)} strengths, and {len(networks)} of the networks are not merged",
                where=request.raw,
                fix="give one strength for each of these, or fewer: the last one counts for the rest",
            )


def _show_metadata(path: Path) -> None:
    if path.is_file():
        with TensorReader(path) as reader:
            print(f"metadata of {path}: {json.dumps(reader.metadata, indent=2, ensure_ascii=False)}")

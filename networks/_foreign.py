"""Network modules that were written for sd-scripts, driven through its interface in its order of calls.

Source: lora_format.md §5. Such a module builds a network out of the text encoders and the U-Net, patches their layers
itself, and knows its own file; nothing else about it is assumed. `lycoris.kohya` is one.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.io.safetensors_file import TensorReader
from library.log import get_logger
from networks._block_weights import block_factor
from networks._foreign_files import refuse_unreadable

logger = get_logger(__name__)

# LyCORIS' algorithms whose merged weight has alpha / dim twice (4.1.3: `get_diff_weight` scales what `get_weight` has
# scaled); their weight is built as their forward pass builds it.
SCALED_TWICE = frozenset({"loha", "kron"})

Groups = list[dict[str, Any]]
Change = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Host:
    """What a network is put on: both text encoders, U-Net and VAE under sd-scripts' module names."""

    text_encoders: list[nn.Module]
    unet: nn.Module
    vae: nn.Module | None


def is_foreign(module: ModuleType) -> bool:
    """Whether a module has sd-scripts' interface and not that of this suite."""
    return hasattr(module, "create_network") and not hasattr(module, "create_from_weights")


class ForeignNetwork(nn.Module):
    """A network of a third-party module, as training and generation use it.

    Its parameters are registered here once it is applied, so that an optimizer, DDP and a state see them as those of
    this suite's networks. `state_dict` holds the raw tensors, not those of the file: what a module stores in its file
    may be a difference (LyCORIS' full) from which the weights cannot be had back to the bit.
    """

    def __init__(self, network: nn.Module, host: Host, *, module: str, facts: Mapping[str, str]) -> None:
        super().__init__()
        self.network = network
        self.module_name = module
        self.facts = {"ss_network_module": module, **facts}
        self._host = (host,)
        self.multiplier = float(getattr(network, "multiplier", 1.0))
        self.block_weights: tuple[float, ...] = ()
        self.path: str | None = None  # the file that it was built from

    # --- building, in the order of sd-scripts ---

    def apply(self, *, text_encoders: bool, unet: bool) -> None:  # type: ignore[override]
        """Hook it into the forward passes of the text encoders and of the U-Net."""
        host = self._host[0]
        self.network.apply_to(host.text_encoders, host.unet, text_encoders, unet)

    def attach(self) -> "ForeignNetwork":
        """Hook a network that was built from a file into all that the file has, and see that its weights are in it."""
        assert self.path is not None
        self.apply(text_encoders=True, unet=True)
        self.load(self.path)
        self.set_multiplier(self.multiplier)
        return self

    def load(self, path: str) -> None:
        """Fill it from a file through the module's own `load_weights`, unless the file's weights are in it already.

        LyCORIS' `create_network_from_weights` fills what it builds, and for its full algorithm a second load would
        add the difference twice.
        """
        before = self.file_tensors(None)
        stored = _read(Path(path))
        if _same(before, stored):
            return
        info = self.network.load_weights(path)
        logger.info("%s: loaded by %s: %s", path, self.module_name, _shortened(info))
        wrong = sorted(set(stored) - set(before))
        if wrong and len(wrong) == len(stored):
            raise UserError(
                f"none of its {len(stored)} tensors belongs to this network (the first: {wrong[0]})",
                where=f"--network_weights {path}",
                fix=f"name a file that {self.module_name} made with the same network_args",
            )

    def param_groups(self, *, text_encoder_lrs: list[float], unet_lr: float | None, default_lr: float) -> Groups:
        """Optimizer groups `{"name", "params", "lr"}` as the module makes them; what is in none is frozen.

        text_encoder_lrs: [] for default_lr, one for both, or one each. Groups without a rate have default_lr.
        """
        host = self._host[0]
        made, names = self._optimizer_params(text_encoder_lrs, unet_lr, default_lr)
        groups = _groups(made, names, default_lr)
        prepare_grad = getattr(self.network, "prepare_grad_etc", None)
        if prepare_grad is not None:
            prepare_grad(host.text_encoders, host.unet)
        # Before DDP wraps the step: a parameter that no optimizer moves must not be waited for.
        trained = {id(p) for group in groups for p in group["params"]}
        for p in self.network.parameters():
            p.requires_grad_(id(p) in trained)
        return groups

    def _optimizer_params(self, te: list[float], unet_lr: float | None, default_lr: float) -> tuple[Any, list[str]]:
        several = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        prepare: Any
        first: Any
        if several is not None:
            prepare, first = several, te or None
        else:
            prepare, first = self.network.prepare_optimizer_params, te[0] if te else None
            if len(set(te)) > 1:
                logger.warning("%s knows one rate for both text encoders: %g, the first", self.module_name, te[0])
        try:
            made = prepare(first, unet_lr, default_lr)
        except TypeError:  # an older module; an error of another kind comes again
            made = self.network.prepare_optimizer_params(te[0] if te else None, unet_lr)
        if isinstance(made, tuple):
            return made[0], list(made[1] or [])
        return made, []

    # --- moments of a run ---

    def tell(self, moment: str) -> None:
        """Call `on_epoch_start` or `on_step_start` where the module has it."""
        listener = getattr(self.network, moment, None)
        if listener is not None:
            listener(self._host[0].text_encoders, self._host[0].unet)

    def after_step(self, max_norm: float | None) -> dict[str, Tensor]:
        """Norm limits and norms to log, after an optimizer step; 0-d tensors."""
        update_norms = getattr(self.network, "update_norms", None)
        if update_norms is not None:
            update_norms()
        if max_norm:
            device = next(self.network.parameters()).device
            keys, mean, highest = self.network.apply_max_norm_regularization(max_norm, device)
            values = {"norm/keys_scaled": keys, "norm/mean": mean, "norm/max": highest}
        else:
            norms = self._norms()
            values = {} if norms is None else {"norm/mean": norms.mean(), "norm/max": norms.max()}
        return {name: torch.as_tensor(value, dtype=torch.float32).detach() for name, value in values.items()}

    def _norms(self) -> Tensor | None:
        for name in ("combined_weight_norms", "weight_norms"):
            if hasattr(self.network, name) and (norms := getattr(self.network, name)()) is not None:
                return norms
        return None

    # --- strength ---

    @property
    def shows_units(self) -> bool:
        """Whether the network keeps its modules in the lists that sd-scripts' own networks have."""
        return hasattr(self.network, "unet_loras")

    @property
    def units(self) -> list[Any]:
        """The network's modules, one per adapted layer; [] when it does not show them."""
        found = [*getattr(self.network, "text_encoder_loras", []), *getattr(self.network, "unet_loras", [])]
        return [unit for unit in found if hasattr(unit, "lora_name") and hasattr(unit, "multiplier")]

    def count(self, part: str) -> int:
        """How many modules sit on a part ("te1", "te2" or "unet")."""
        return sum(unit.lora_name.startswith(f"lora_{part}_") for unit in self.units)

    def set_multiplier(self, multiplier: float) -> None:
        """Scale the network's effect, each block by its own weight besides; 0 switches it off."""
        self.multiplier = multiplier
        if hasattr(self.network, "set_multiplier"):
            self.network.set_multiplier(multiplier)
        for unit in self.units:
            unit.multiplier = multiplier * block_factor(unit.lora_name, self.block_weights)

    def set_block_weights(self, weights: tuple[float, ...]) -> None:
        """Weights of the blocks, by the list lengths that `block_factor` knows; UserError when it shows no modules."""
        if weights and not self.units:
            raise UserError(
                f"{self.module_name} does not show its modules, so blocks cannot have weights of their own",
                where="--network_block_weights",
                fix="give this network no block weights",
            )
        self.block_weights = weights
        self.set_multiplier(self.multiplier)

    def changes(self) -> Iterator[tuple[nn.Module, Change]]:
        """Each adapted layer with a function of what is added to its weight and bias at the strengths in force.

        It starts from the layer's weights as they are then, and gives float32 tensors by parameter name. Needs the
        modules of LyCORIS; UserError for a network of another build.
        """
        units = self.units
        if not units or not all(hasattr(unit, "get_merged_weight") for unit in units):
            raise UserError(
                f"{self.module_name} does not say what it adds to a weight",
                where="--network_merge or --network_pre_calc",
                fix="apply this network without merging it",
            )
        for unit in units:
            yield unit.org_module[0], partial(_change, unit)

    # --- files and state ---

    def file_tensors(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The tensors of the network's file as its `save_weights` writes it, on the CPU."""
        return self._saved(dtype)[0]

    def export(self, *, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors, metadata) of the network's file; the metadata holds what the module itself adds."""
        tensors, metadata = self._saved(dtype)
        # The hashes are those of the file with all its metadata, which is not this one.
        own = {name: text for name, text in metadata.items() if not name.startswith("sshs_")}
        return tensors, {**self.facts, **own}

    def _saved(self, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.safetensors"
            self.network.save_weights(str(path), dtype, {})
            with TensorReader(path) as reader:
                return {name: reader[name].clone() for name in reader}, dict(reader.metadata)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The raw parameters and persistent buffers."""
        return dict(self._raw())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over raw tensors of the same names and shapes."""
        own = dict(self._raw())
        assert own.keys() == state_dict.keys() or not strict, "the state is of another network"
        with torch.no_grad():
            for name, value in state_dict.items():
                own[name].copy_(value)

    def _raw(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters()
        for path, module in self.named_modules():
            for name, value in module._buffers.items():
                if value is not None and name not in module._non_persistent_buffers_set:
                    yield f"{path}.{name}" if path else name, value


# --- making networks -------------------------------------------------------------------------------------------------


def create(
    module: ModuleType, host: Host, *, dim: int | None, alpha: float, dropout: float | None, args: Mapping[str, str]
) -> ForeignNetwork:
    """A new network for training. args: network_args, texts, as sd-scripts hands them over.

    Raises UserError when the module makes none, or refuses its arguments.
    """
    name = module.__name__
    kwargs: dict[str, Any] = dict(args)
    kwargs.setdefault("dropout", dropout)
    with _own_failures(name, "network_args"), untouched_settings(module):
        network = module.create_network(
            1.0, dim, alpha, host.vae, host.text_encoders, host.unet, neuron_dropout=dropout, **kwargs
        )
    facts = {"ss_network_dim": str(dim or 4), "ss_network_alpha": str(alpha)}
    if args:
        facts["ss_network_args"] = json.dumps(dict(args))
    return ForeignNetwork(_made(network, name), host, module=name, facts=facts)


def create_from_weights(
    module: ModuleType,
    host: Host,
    path: str,
    *,
    multiplier: float = 1.0,
    for_inference: bool = False,
    args: Mapping[str, str] | None = None,
) -> ForeignNetwork:
    """The network that a file describes, not yet applied. Raises UserError when the module cannot read the file."""
    name = module.__name__
    if not hasattr(module, "create_network_from_weights"):
        raise UserError(f"{name} cannot build a network from a file", "--network_module", "choose another module")
    refuse_unreadable(name, path)
    with _own_failures(name, f"--network_weights {path}"), untouched_settings(module):
        made = module.create_network_from_weights(
            multiplier, path, host.vae, host.text_encoders, host.unet, for_inference=for_inference, **(args or {})
        )
    network = made[0] if isinstance(made, tuple) else made
    facts = {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    found = ForeignNetwork(_made(network, name), host, module=name, facts=facts)
    found.multiplier, found.path = multiplier, path
    return found


@contextmanager
def untouched_settings(module: ModuleType) -> Iterator[None]:
    """Put the class settings of a module back after a network is built.

    Network modules keep what they target in class attributes (written in capitals) and change them while they build
    one network, which would change the next one of the same process.
    """
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    before = [(c, {name: _copied(value) for name, value in vars(c).items() if name.isupper()}) for c in classes]
    try:
        yield
    finally:
        for owner, settings in before:
            for name in [name for name in vars(owner) if name.isupper() and name not in settings]:
                delattr(owner, name)
            for name, value in settings.items():
                setattr(owner, name, value)


@torch.no_grad()
def _change(unit: Any) -> dict[str, Tensor]:
    layer = unit.org_module[0]
    if getattr(unit, "name", None) in SCALED_TWICE:
        diff = unit.get_weight(layer.weight.shape) * unit.scalar
        if unit.wd:
            merged = unit.apply_weight_decompose(layer.weight + diff, unit.multiplier), None
        else:
            merged = layer.weight + diff * unit.multiplier, None
    else:
        merged = unit.get_merged_weight(unit.multiplier, layer.weight.shape, layer.weight.device)
    found = {name: value for name, value in zip(("weight", "bias"), merged, strict=True) if value is not None}
    return {name: value.float() - getattr(layer, name).float() for name, value in found.items()}


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, list | dict | set) else value


@contextmanager
def _own_failures(name: str, where: str) -> Iterator[None]:
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the module raises, it is about what the user asked it for
        raise UserError(
            f"{name} failed with {type(error).__name__}: {error}",
            where=where,
            fix="look up the arguments in the documentation of the module",
        ) from error


def _made(network: Any, name: str) -> nn.Module:
    if network is None:
        raise UserError(f"{name} made no network", "--network_module", "look at what it printed above")
    return network


def _groups(made: Iterable[Any], names: list[str], default_lr: float) -> Groups:
    entries = list(made)
    if entries and not isinstance(entries[0], Mapping):
        entries = [{"params": entries}]
    groups: Groups = []
    for index, entry in enumerate(entries):
        params = [p for p in entry["params"] if isinstance(p, Tensor)]
        rate = entry.get("lr")
        name = names[index] if index < len(names) and names[index] else f"network {index + 1}"
        if params:
            extra = {key: value for key, value in entry.items() if key not in ("params", "lr", "name")}
            groups.append({"name": name, "params": params, "lr": default_lr if rate is None else float(rate), **extra})
    return groups


def _read(path: Path) -> dict[str, Tensor]:
    with TensorReader(path) as reader:
        return {name: reader.get(name) for name in reader}


def _same(mine: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
    """Whether the network holds a file's weights already, up to the rounding of sums and of the file's dtype."""
    if mine.keys() != stored.keys() or any(mine[name].shape != stored[name].shape for name in stored):
        return False
    return all(
        torch.allclose(mine[name].float(), value.float(), rtol=1e-2, atol=1e-5) for name, value in stored.items()
    )


def _shortened(info: Any) -> str:
    text = str(info)
    return text if len(text) <= 300 else text[:300] + " …"

"""Putting networks on a model: the naming of its parts, several networks with strengths, merging."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.errors import UserError
from library.inference.foreign import load_foreign
from library.io.hashing import tensors_identity
from library.io.safetensors_file import TensorReader
from library.log import get_logger
from library.models.bundle import ModelBundle
from library.models.keymaps.unet import diffusers_to_sai
from library.plugins import load_plugin
from networks._files import format_of
from networks._foreign import is_foreign
from networks._keys import AdapterRoot
from networks._network import AdapterNetwork

logger = get_logger(__name__)


def adapter_roots(bundle: ModelBundle) -> list[AdapterRoot]:
    """Where adapters can sit: te1, te2 and unet with sd-scripts' names; parts that were not loaded are left out."""
    roots = []
    if bundle.text_encoder_1 is not None:
        # The first encoder is read at the layer before its last, so its last layer has no effect.
        last = bundle.text_encoder_1.config.num_hidden_layers - 1
        unused = tuple(f"{start}encoder.layers.{last}" for start in ("", "text_model."))
        roots.append(AdapterRoot("te1", "lora_te1", bundle.text_encoder_1, _text_name, unused))
    if bundle.text_encoder_2 is not None:
        roots.append(AdapterRoot("te2", "lora_te2", bundle.text_encoder_2, _text_name))
    if bundle.unet is not None:
        roots.append(unet_root(bundle.unet))
    return roots


def unet_root(unet: nn.Module) -> AdapterRoot:
    """A U-Net, in memory or on the meta device, with sd-scripts' names."""
    return AdapterRoot("unet", "lora_unet", unet, diffusers_to_sai)


def load_networks(
    bundle: ModelBundle,
    *,
    modules: Sequence[str],
    weights: Sequence[str],
    muls: Sequence[float] = (),
    merge: bool = False,
) -> list[AdapterNetwork]:
    """Put network files on the model: applied, in order; or merged into its weights, then none is returned.

    modules: kinds such as networks.lora, one for each of weights. muls: strengths, 1.0 where one is missing. The
    networks come in the dtype and on the device of the part they sit on.
    Raises UserError for files that are missing, broken or made for another model.
    """
    assert len(modules) == len(weights) >= len(muls), "the settings are checked before"
    strengths = [*muls, *[1.0] * (len(weights) - len(muls))]
    networks = []
    for module, path, strength in zip(modules, weights, strengths, strict=True):
        network = read_network(bundle, module, Path(path), strength)
        counts = ", ".join(f"{network.count(part)} in {part}" for part in ("te1", "te2", "unet") if network.count(part))
        logger.info("%s %s x %g (%s)", "merged" if merge else "applied", path, strength, counts)
        if merge:
            network.merge(backup=False)
        else:
            networks.append(network.attach())
    return networks


def set_strengths(networks: Sequence[AdapterNetwork], strengths: Sequence[float]) -> None:
    """Set each network's multiplier; a short list is padded with its last value, as sd-scripts does."""
    for index, network in enumerate(networks):
        network.set_multiplier(strengths[min(index, len(strengths) - 1)])


def merge_base_weights(
    bundle: ModelBundle, files: Sequence[Mapping[str, Tensor]], *, names: Sequence[str], muls: Sequence[float]
) -> None:
    """Merge network files of any kind of this suite into the model for good; muls: strengths, 1.0 where missing.

    Text encoders that change get another identity, so that outputs cached before are not taken for theirs.
    Raises UserError for files made for another model.
    """
    strengths = [*muls, *[1.0] * (len(files) - len(muls))]
    parts, changed = set(), hashlib.sha256()
    for tensors, name, strength in zip(files, names, strengths, strict=True):
        kind = load_plugin("networks", format_of(tensors).kinds[0].removeprefix("networks."))
        network = kind.create_from_weights(adapter_roots(bundle), tensors, multiplier=strength, where=name)
        network.merge(backup=False)
        parts |= {target.part for target in network.targets.values()}
        changed.update(f"{strength!r} {tensors_identity(tensors)}".encode())
        logger.info("merged %s x %g into the model (%d modules)", name, strength, len(network.adapters))
    stored, merged = bundle.identify, changed.hexdigest()[:16]
    names_of = {"te1": "text_encoder_1", "te2": "text_encoder_2", "unet": "unet"}
    differ = {names_of[part] for part in parts}
    bundle.identify = lambda part: stored(part) + (merged if part in differ else "")


def _text_name(path: str) -> str:
    """sd-scripts' name of a text encoder's module: transformers leaves `text_model.` out of CLIPTextModel's paths."""
    return path if path.startswith(("text_model.", "text_projection")) else "text_model." + path


def read_network(
    bundle: ModelBundle, module: str, path: Path, strength: float, args: Mapping[str, str] | None = None
) -> Any:
    """The network of a file, on its parts' devices and in their dtypes, not attached yet: this suite's or another's.

    args: arguments of a third-party module. Raises UserError for files that are missing, broken or for another model.
    """
    kind = load_plugin("networks", module)
    if not path.is_file():
        raise UserError("there is no such network file", str(path), "check the path in network_weights")
    if is_foreign(kind):
        return load_foreign(bundle, kind, path, strength=strength, args=args)
    if not hasattr(kind, "create_from_weights"):
        raise UserError(f"{module} is not a network module", "network_module", "use networks.lora")
    if args:
        raise UserError(
            "network_args have no effect on networks that are loaded from files", "network_args", "remove it"
        )
    with TensorReader(path) as tensors:
        network = kind.create_from_weights(adapter_roots(bundle), tensors, multiplier=strength, where=str(path))
    for adapter in network.adapters.values():
        weight = adapter.base.weight
        adapter.place(weight.device, weight.dtype)
    return network.eval().requires_grad_(False)

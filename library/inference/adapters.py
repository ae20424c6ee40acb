"""Putting networks on a model: the naming of its parts, several networks with strengths, merging."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.inference.foreign import load_foreign
from library.io.safetensors_file import TensorReader
from library.log import get_logger
from library.models.bundle import ModelBundle
from library.models.keymaps.unet import diffusers_to_sai
from library.plugins import load_plugin
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
        roots.append(AdapterRoot("unet", "lora_unet", bundle.unet, diffusers_to_sai))
    return roots


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
        adapter.to(device=weight.device, dtype=weight.dtype)
    return network.eval().requires_grad_(False)

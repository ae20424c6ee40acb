"""Third-party network modules on this suite's models: sd-scripts' names over the parts, networks from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from library.errors import UserError
from library.models.bundle import ModelBundle
from library.models.kohya_view import text_encoder_view, unet_view
from networks._foreign import ForeignNetwork, Host, create_from_weights


def host_of(bundle: ModelBundle) -> Host:
    """The bundle's parts under sd-scripts' module names; a part that was not loaded is missing."""
    encoders = (bundle.text_encoder_1, bundle.text_encoder_2)
    return Host([text_encoder_view(encoder) for encoder in encoders], unet_view(bundle.unet), bundle.vae)


def load_foreign(
    bundle: ModelBundle, module: ModuleType, path: Path, *, strength: float, args: Mapping[str, str] | None = None
) -> ForeignNetwork:
    """The network of a file, on the device and in the dtype of the U-Net, not attached yet.

    args: further arguments of the module, texts, as sd-scripts hands them over.

    Raises UserError when the module cannot read the file or finds nothing of it in the model.
    """
    network = create_from_weights(
        module, host_of(bundle), str(path), multiplier=strength, for_inference=True, args=args or {}
    )
    if network.shows_units and not network.units:
        raise UserError(
            f"{module.__name__} finds no module of this file in the model",
            where=str(path),
            fix="choose a file made for SDXL, with that module",
        )
    network.set_multiplier(strength)
    device, dtype = bundle.unet.device, bundle.unet.dtype  # each is a walk over the whole U-Net: not once a unit
    for module_of_it in (network, *network.units):  # the modules are not registered before it is attached
        module_of_it.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return network

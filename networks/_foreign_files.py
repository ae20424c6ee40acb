"""Files of third-party modules that their own module cannot build a network from: named before it tries."""

from pathlib import Path

from library.errors import UserError
from library.io.safetensors_file import TensorReader


def refuse_unreadable(module: str, path: str) -> None:
    """Raise UserError for what `module` (its full name) would fail at when it builds a network from the file.

    LyCORIS 4.1.3 makes the magnitudes of `dora_wd` those of outputs, whatever the file has.
    """
    if module.split(".")[0] != "lycoris" or Path(path).suffix != ".safetensors":
        return
    with TensorReader(Path(path)) as tensors:
        key = next((key for key in tensors if key.endswith(".dora_scale")), None)
        if key is None:
            return
        shape, is_lora = tuple(tensors[key].shape), f"{key.partition('.')[0]}.lora_up.weight" in tensors
    if len(shape) > 1 and shape[0] == 1 < shape[1]:
        raise UserError(
            f"{key} has shape {shape}, magnitudes of inputs (wd_on_output=False), which {module} cannot take from a "
            "file by itself",
            path,
            "use network_module networks.dora, which reads it"
            if is_lora
            else "train it on with network_weights and the network_args that it was made with; it cannot be drawn with",
        )

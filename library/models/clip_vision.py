"""CLIP's image encoder with its projection (Radford et al. 2021).

Shape letters: B pictures, S side in pixels (224), P projected width.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

from library.errors import UserError
from library.io.safetensors_file import TensorReader
from library.models import hub
from library.models.assemble import filled
from library.models.diffusers_folder import read_config, weight_names


def load_image_encoder(name: str, *, width: int, dtype: torch.dtype) -> nn.Module:
    """The image encoder of a CLIP model, alone or with its text encoder: a folder or a hub id; on the CPU, frozen.

    Raises UserError when there is none, when it is not whole, when it is not safetensors, and when its projection has
    another width than `width`.
    """
    half = dtype == torch.float16
    folder = Path(name) if Path(name).is_dir() else hub.download_files(name, lambda files: _files(files, half, name))
    config = _config(folder, name, width=width)
    with torch.device("meta"):
        module = CLIPVisionModelWithProjection(config).eval()
    with ExitStack() as stack:
        tensors: dict[str, Tensor] = {}
        wanted = module.state_dict()
        for file in _weights([path.name for path in folder.iterdir()], half):
            reader = stack.enter_context(TensorReader(folder / file))
            tensors |= {key: reader[key] for key in reader if key in wanted}
        wrong = [key for key in wanted if key not in tensors or tensors[key].shape != wanted[key].shape]
        if wrong:
            what = f"{len(wanted)} tensors make an image encoder, of which {len(wrong)} are missing or of another shape"
            fix = "name a CLIP model with safetensors in its folder"
            raise UserError(f"{what} (such as {wrong[0]})", where=f"clip_vision_model {name}", fix=fix)
        return filled(module, tensors, device="cpu", dtype=dtype, where=name)


def check_image_encoder(name: str, *, width: int) -> None:
    """Raise UserError for a folder whose encoder has another width; of a hub's model nothing is known before."""
    if Path(name).is_dir():
        _config(Path(name), name, width=width)


@torch.no_grad()
def embed(encoder: Any, pixels_B3SS: Tensor) -> Tensor:
    """Projected vectors (B, P) of pictures, in the encoder's dtype."""
    return encoder(pixel_values=pixels_B3SS.to(encoder.device, encoder.dtype)).image_embeds


def _config(folder: Path, name: str, *, width: int) -> CLIPVisionConfig:
    config = CLIPVisionConfig(**_vision_part(read_config(folder)))
    if config.projection_dim != width:
        raise UserError(
            f"the image encoder's vectors have {config.projection_dim} numbers, and the model's pooled vectors {width}",
            where=f"clip_vision_model {name}",
            fix="use the one that belongs to the model's text encoder: for SDXL CLIP ViT-bigG-14",
        )
    return config


def _vision_part(config: dict[str, Any]) -> dict[str, Any]:
    """The image encoder's settings; a whole CLIP model has them inside, and the projection's width beside them."""
    if "vision_config" not in config:
        return config
    beside = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
    return {**config["vision_config"], **beside}


def _weights(names: list[str], half: bool) -> list[str]:
    return weight_names([name for name in names if name.endswith(".safetensors")], "text_encoder_2", half=half)


def _files(names: list[str], half: bool, repo: str) -> list[str]:
    """What an image encoder needs of a hub repository."""
    found = _weights([name for name in names if "/" not in name], half)
    if "config.json" not in names or not found:
        fix = "give the folder of a CLIP model on this computer"
        raise UserError("this hub repository holds no CLIP model as safetensors", where=repo, fix=fix)
    return ["config.json", *found]

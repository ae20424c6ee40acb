"""Pictures as prompts: CLIP's embedding of what is drawn over, in the place of the pooled vector (gen_img.md 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.inference.request import GenRequest
from library.inference.texts import picture_key
from library.io.images import read_image
from library.log import get_logger
from library.models.clip_vision import check_image_encoder, embed, load_image_encoder

if TYPE_CHECKING:
    from library.config.run_config import RunConfig
    from library.models.arch import SdxlArch
    from library.models.bundle import ModelBundle

logger = get_logger(__name__)

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue in CLIP's training data
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class ImagePrompts:
    """Vectors of pictures times `strength`, by picture; a picture is embedded once.

    The encoder is in memory only while there is something to embed.
    """

    def __init__(self, name: str, strength: float) -> None:
        self._name, self._strength = name, strength
        self._vectors: dict[str | int, Tensor] = {}
        self._pictures: list[Image.Image] = []  # their ids are keys, so that no other object may take them

    @torch.no_grad()
    def vectors(self, bundle: ModelBundle, requests: Sequence[GenRequest]) -> dict[str | int, Tensor]:
        """(1, P) on the CPU for each picture that the requests are drawn over; P is the model's pooled width.

        Pictures are embedded one by one, so that none depends on the others. Raises as `load_image_encoder`, and for
        a file that is no picture.
        """
        pictures = {picture_key(request.image): request.image for request in requests if request.image is not None}
        new = {key: picture for key, picture in pictures.items() if key not in self._vectors}
        if new:
            width = bundle.text_encoder_2.config.projection_dim
            encoder = load_image_encoder(self._name, width=width, dtype=bundle.unet.dtype).to(bundle.unet.device)
            logger.info("embedding %d pictures with %s", len(new), self._name)
            for key, picture in new.items():
                image = Image.fromarray(read_image(picture)) if isinstance(picture, str) else picture
                self._pictures += [] if isinstance(picture, str) else [picture]
                vector = embed(encoder, image_pixels(image, encoder.config.image_size)[None])
                self._vectors[key] = (vector * self._strength).to("cpu")
        return {key: self._vectors[key] for key in pictures}


def image_prompts(cfg: RunConfig) -> ImagePrompts | None:
    """Those of a run; None where prompts keep their own pooled vectors."""
    options = cfg.clip_vision
    if options.clip_vision_strength is None:
        return None
    return ImagePrompts(options.clip_vision_model, options.clip_vision_strength)


def check_image_prompts(cfg: RunConfig, arch: SdxlArch | None) -> None:
    """Raise UserError for an image encoder of another width than a model of `arch` needs (None: not known yet)."""
    encoder = None if arch is None else arch.text_encoder_2
    if cfg.clip_vision.clip_vision_strength is not None and encoder is not None and encoder.projection is not None:
        check_image_encoder(cfg.clip_vision.clip_vision_model, width=encoder.projection)


def image_pixels(picture: Image.Image, side: int) -> Tensor:
    """A picture as CLIP sees it, (3, S, S) float32, S pixels wide and high.

    The shorter side becomes S (bicubic), the middle of the longer one stays; as in openai/CLIP and transformers.
    """
    width, height = picture.size
    shorter = min(width, height)
    size = (int(side * width / shorter), int(side * height / shorter))
    resized = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    pixels = torch.from_numpy(np.array(resized.crop((left, top, left + side, top + side)))).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_DEVIATION)[:, None, None]

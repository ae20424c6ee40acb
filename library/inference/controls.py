"""Control images in generation: which picture takes which, and the ControlNet-LLLites that follow them.

Source: gen_img.md section 13 (the order of the images, sizes and ratios).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.errors import UserError
from library.inference.adapters import unet_root
from library.inference.followers import BeforeCall, UNetCall
from library.inference.request import CELL, GenRequest
from library.inference.source_pictures import picture_files, picture_pixels
from library.io.images import read_size
from library.io.safetensors_file import TensorReader
from library.log import get_logger
from library.models.assemble import empty_module
from library.models.bundle import ModelBundle
from library.sizes import Size
from networks import control_net_lllite
from networks._lllite_files import sizes_of
from networks.control_net_lllite import LLLiteNetwork

if TYPE_CHECKING:
    from library.config.generate import GenerateOptions
    from library.config.run_config import RunConfig
    from library.models.arch import SdxlArch

logger = get_logger(__name__)


@dataclass(frozen=True)
class Control:
    """A network on the U-Net, and the share of the steps, from the first on, in which it acts."""

    network: LLLiteNetwork
    ratio: float = 1.0


class Controls:
    """The networks of a run, in order; the first control images of a request are theirs, or it has none at all."""

    def __init__(self, controls: Sequence[Control]) -> None:
        self.controls = tuple(controls)

    @contextmanager
    def on(self, batch: Sequence[GenRequest], *, calls: int, device: torch.device) -> Iterator[BeforeCall | None]:
        """Condition the networks on the images of a batch whose requests are all of one size.

        Each is embedded once for a size of the latents. A network of ratio r is switched off before call i (from 0)
        when r < i / calls.
        """
        embedded_at: Size | None = None  # Gradual Latent changes it

        def before_call(call: UNetCall) -> None:
            nonlocal embedded_at
            size = Size(call.x_BChw.shape[-1] * CELL, call.x_BChw.shape[-2] * CELL)
            for index, control in enumerate(self.controls):
                if control.ratio < call.number / call.of:
                    control.network.set_condition(None)
                elif size != embedded_at:
                    images = [picture_pixels(request.control[index], size) for request in batch]
                    control.network.set_condition(torch.stack(images).to(device))
            embedded_at = size

        count = sum(bool(request.control) for request in batch)
        assert count in (0, len(batch)), "requests with and without control images share no batch"
        try:
            yield before_call if count else None
        finally:
            for control in self.controls:
                control.network.set_condition(None)


def guide_images(cfg: RunConfig) -> list[tuple[str, ...]]:
    """The control images of one picture after the other, one for each LLLite and then for each ControlNet; [] without.

    A folder stands for its images, by name. Raises UserError for files that are no images, an empty folder, and a
    number of images that the networks do not share out evenly.
    """
    count = len(cfg.generate.control_net_lllite_models) + len(cfg.control_net.control_net_models)
    if not count:
        return []
    paths = picture_files(cfg.generate.guide_image_path, option="guide_image_path")
    if len(paths) % count:
        raise UserError(
            f"{len(paths)} control images cannot be shared out among {count} networks",
            where="guide_image_path",
            fix=f"name {count} images for each picture, in the order of control_net_lllite_models and then "
            "control_net_models",
        )
    return [tuple(paths[start : start + count]) for start in range(0, len(paths), count)]


def with_guides(
    requests: Sequence[GenRequest], guides: Sequence[tuple[str, ...]], *, start: int = 0
) -> list[GenRequest]:
    """The pictures of a run, from number `start` on, with their control images: one group after the other, then from
    the first again.
    """
    if not guides:
        return list(requests)
    return [replace(request, control=guides[number % len(guides)]) for number, request in enumerate(requests, start)]


def check_models(options: GenerateOptions, arch: SdxlArch | None) -> None:
    """Raise UserError for control_net_lllite_models that are no such file or made for another model.

    Called before the model is loaded, with what it is made of (None: not known yet). Headers are all that is read.
    """
    paths = options.control_net_lllite_models
    root = unet_root(empty_module(arch, "unet")) if arch is not None and paths else None
    for path in paths:
        with TensorReader(Path(path)) as file:
            tensors = {name: torch.empty(file.info(name).shape, device="meta") for name in file}
        sizes_of(tensors, where=path)
        if root is not None:
            control_net_lllite.check_base(root, tensors, where=path)


def load_controls(bundle: ModelBundle, options: GenerateOptions) -> Controls:
    """Put the networks of control_net_lllite_models on the U-Net, in its dtype and on its device.

    Raises UserError for files made for another model.
    """
    root = unet_root(bundle.unet)
    controls = []
    for index, path in enumerate(options.control_net_lllite_models):
        strength = _at(options.control_net_multipliers, index)
        with TensorReader(Path(path)) as tensors:
            network = control_net_lllite.read(root, tensors, multiplier=strength, where=path)
        network.to(device=bundle.unet.device, dtype=bundle.unet.dtype).eval().requires_grad_(False)
        network.attach()
        logger.info("applying %s x %g (%d modules)", path, strength, len(network.parts))
        controls.append(Control(network, _at(options.control_net_ratios, index)))
    return Controls(controls)


def _at(values: Sequence[float], index: int) -> float:
    return values[index] if index < len(values) else 1.0


def check_samples(requests: Sequence[GenRequest], *, where: str) -> None:
    """Raise UserError unless every sample picture of a LLLite's training run names a control image that is there."""
    for request in requests:
        if not request.control:
            what = f'the prompt "{request.prompt}" has no control image'
            raise UserError(what, where, 'add --cn path/to/image.png, or controlnet_image = "…" in a table')
        for path in request.control:
            if not Path(path).is_file():
                raise UserError(f"the control image {path} does not exist", where, "check the path after --cn")
            read_size(path)

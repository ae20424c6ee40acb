"""ControlNets in generation: networks beside the U-Net whose residuals make a picture follow a control image.

Source: Zhang et al. 2023 (ControlNet); gen_img.md section 13 for images, strengths and ratios, as for LLLites.
Shape letters: B batch, H W pixels, C channels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from library.config.preps import Prep, parse_prep
from library.inference.deep_shrink import DOWN, MID
from library.inference.followers import BeforeCall, UNetCall
from library.inference.request import CELL, GenRequest
from library.inference.source_pictures import picture_pixels
from library.log import get_logger
from library.models import attention
from library.models.control_net import load_control_net, open_control_net
from library.sizes import Size

if TYPE_CHECKING:
    from library.config.run_config import RunConfig
    from library.models.arch import SdxlArch
    from library.models.bundle import ModelBundle

logger = get_logger(__name__)


@dataclass(frozen=True)
class ControlNet:
    """A network whose own embedding of images is taken out, so that an image is embedded once and not at every call.

    embed: that embedding. prep: what becomes of an image before (None: nothing). bgr: it takes blue first. ratio: the
    share of the steps, from the first on, in which it acts.
    """

    network: Any
    embed: nn.Module
    bgr: bool = False
    prep: Prep | None = None
    strength: float = 1.0
    ratio: float = 1.0

    @classmethod
    def of(cls, network: Any, *, prep: Prep | None = None, strength: float = 1.0, ratio: float = 1.0) -> ControlNet:
        """A diffusers ControlNetModel, which is changed for it."""
        embed, bgr = network.controlnet_cond_embedding, network.config.controlnet_conditioning_channel_order == "bgr"
        network.controlnet_cond_embedding = nn.Identity()
        network.register_to_config(controlnet_conditioning_channel_order="rgb")
        return cls(network, embed, bgr, prep, strength, ratio)

    def image(self, path: str, size: Size) -> Tensor:
        """A control image at a size, (3, H, W) float32 in [0, 1], prepared."""
        pixels = picture_pixels(path, size) / 2 + 0.5
        if self.prep is not None:
            from library.data.conditions import MAKERS

            values = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            made = MAKERS[self.prep.kind](np.ascontiguousarray(values), self.prep.settings)
            pixels = torch.from_numpy(made).permute(2, 0, 1).float() / 255
        return pixels.flip(0) if self.bgr else pixels

    def embedded(self, images_B3HW: Tensor) -> Tensor:
        """The embedding (B, C, h, w) of control images."""
        network = self.network
        return self.embed(images_B3HW.to(network.device, network.dtype))

    def residuals(self, call: UNetCall, embedded_BChw: Tensor) -> tuple[list[Tensor], Tensor]:
        """What is added to the results of the U-Net's input blocks, and to that of its middle."""
        network, text = self.network, call.text
        branches = len(call.x_BChw) // len(embedded_BChw)
        added = {
            "text_embeds": text.pooled_BP.to(network.dtype),
            "time_ids": call.sizes_B6.to(network.device, torch.float32),
        }
        return network(
            call.x_BChw.to(network.dtype),
            call.t_B.to(network.device),
            encoder_hidden_states=text.hidden_BTD.to(network.dtype),
            controlnet_cond=embedded_BChw.repeat(branches, 1, 1, 1),
            conditioning_scale=self.strength,
            added_cond_kwargs=added,
            return_dict=False,
        )


class ControlNets:
    """The ControlNets of a run, in order; the control image of the first is number `first` of a request's."""

    def __init__(self, nets: Sequence[ControlNet], *, first: int = 0) -> None:
        self.nets, self.first = tuple(nets), first

    @property
    def models(self) -> list[nn.Module]:
        """What is called beside the U-Net."""
        return [model for net in self.nets for model in (net.network, net.embed)]

    @contextmanager
    def on(self, batch: Sequence[GenRequest], *, calls: int, device: torch.device) -> Iterator[BeforeCall | None]:
        """Add up the residuals for a batch whose requests are all of one size; a network of ratio r is left out from
        call i (from 0) on when r < i / calls.

        Images are embedded once for each size of the latents.
        """
        if not self.nets or not any(request.control for request in batch):
            yield None
            return
        embedded: dict[tuple[int, Size], Tensor] = {}

        def before_call(call: UNetCall) -> None:
            h, w = call.x_BChw.shape[-2:]
            size = Size(w * CELL, h * CELL)
            for index, net in enumerate(self.nets):
                if net.ratio < call.number / call.of or net.strength == 0:
                    continue
                if (index, size) not in embedded:
                    paths = [request.control[self.first + index] for request in batch]
                    embedded[index, size] = net.embedded(torch.stack([net.image(path, size) for path in paths]))
                _add(call, *net.residuals(call, embedded[index, size]))

        yield before_call


def _add(call: UNetCall, down: list[Tensor], middle: Tensor) -> None:
    if DOWN in call.extra:
        down = [one + more for one, more in zip(call.extra[DOWN], down, strict=True)]
        middle = call.extra[MID] + middle
    call.extra |= {DOWN: down, MID: middle}


def check_control_nets(cfg: RunConfig, arch: SdxlArch | None) -> None:
    """Raise UserError for control_net_models that do not fit the model; called before it is loaded, reads headers.

    arch: what the model is made of (None: not known yet).
    """
    for name in cfg.control_net.control_net_models:
        with ExitStack() as stack:
            opened = open_control_net(name, stack=stack)
            if arch is not None:
                opened.empty(arch)


def load_control_nets(bundle: ModelBundle, cfg: RunConfig) -> ControlNets:
    """The networks of control_net_models, in the U-Net's dtype and on its device; UserError for those that do not fit.

    Their strengths, ratios and images come after those of control_net_lllite_models.
    """
    options, first, nets = cfg.generate, len(cfg.generate.control_net_lllite_models), []
    preps = cfg.control_net.control_net_preps
    for index, name in enumerate(cfg.control_net.control_net_models):
        network = load_control_net(name, bundle.arch, device=bundle.unet.device, dtype=bundle.unet.dtype)
        attention.configure(network, xformers=options.xformers, device=bundle.unet.device)
        strength = _at(options.control_net_multipliers, first + index)
        prep = parse_prep(preps[index]) if index < len(preps) else None
        ratio = _at(options.control_net_ratios, first + index)
        nets.append(ControlNet.of(network, prep=prep, strength=strength, ratio=ratio))
        logger.info("applying the ControlNet %s x %g", name, strength)
    return ControlNets(nets, first=first)


def _at(values: Sequence[float], index: int) -> float:
    return values[index] if index < len(values) else 1.0

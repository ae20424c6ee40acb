"""From requests to pictures: encodes prompts, batches what can be drawn together, denoises, decodes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from library.inference.followers import Follower
from library.inference.network_set import at_strengths
from library.inference.request import GenRequest
from library.inference.source_pictures import init_latents
from library.inference.stage import Stage, steps_done, with_seeds
from library.inference.texts import Conditioning, TextForm
from library.log import Console
from library.models.bundle import ModelBundle
from library.models.families import sdxl

BAR_DELAY = 2.0  # seconds before a progress bar shows: shorter work needs none


@torch.no_grad()
def encode_requests(
    bundle: ModelBundle,
    requests: Sequence[GenRequest],
    *,
    device: torch.device | str | None = None,
    text_form: TextForm | Literal["generate", "train"] = "generate",
    networks: Sequence[Any] = (),
) -> Conditioning:
    """Encode what the requests say, equal prompts once; the result is on the CPU.

    Afterwards the text encoders are not needed to draw these requests. They work on `device` (None: where they are)
    and are put back. Prompts are encoded one by one, so that a prompt's encoding does not depend on the others.
    """
    conditioning = Conditioning(TextForm(text_form) if isinstance(text_form, str) else text_form)
    with _on(device, bundle.text_encoder_1, bundle.text_encoder_2):
        for request in requests:
            with at_strengths(networks, request.network_muls):
                conditioning.add(bundle, request)
    return conditioning


@torch.no_grad()
def generate(
    bundle: ModelBundle,
    requests: Sequence[GenRequest],
    *,
    device: torch.device | str | None = None,
    batch_size: int = 1,
    vae_batch_size: int | None = None,
    conditioning: Conditioning | TextForm | None = None,
    networks: Sequence[Any] = (),
    followers: Sequence[Follower] = (),
) -> Iterator[tuple[GenRequest, Image.Image]]:
    """Draw the requests and yield each with its picture, in their order.

    Neighbours that agree in size, steps and so on are drawn together, up to batch_size; the VAE decodes
    vae_batch_size of them at once. device: where to compute (None: where the U-Net is). conditioning: the encoded
    requests, when the text encoders are busy or gone; or the form in which they are encoded here (None: a
    generator's). networks: those whose strength the requests' network_muls set. followers: what else acts
    on the U-Net, such as networks with control images. Models should be in eval mode; the dtype is theirs.

    A picture's noise depends on its seed alone. Its numbers can differ in the last bits with the size of the batch
    it is drawn in, since matrix products do, and never with its place in a batch.
    """
    if not isinstance(conditioning, Conditioning):
        form = conditioning or TextForm()
        conditioning = encode_requests(bundle, requests, device=device, text_form=form, networks=networks)
    requests = with_seeds(requests)
    total = sum(steps_done(request, over=request.image is not None) for request in requests)
    with (
        _on(device, bundle.unet, bundle.vae),
        tqdm(
            total=total, desc="drawing", unit="step", delay=BAR_DELAY, leave=False, disable=None, file=Console()
        ) as bar,
    ):
        for batch in _batches(requests, batch_size, conditioning):
            with at_strengths(networks, batch[0].network_muls):
                latents = _drawn(Stage(bundle, conditioning, followers, bar), batch)
            pictures = _decoded(bundle, latents, vae_batch_size or batch_size)
            yield from zip(batch, pictures, strict=True)


def _batches(requests: Sequence[GenRequest], batch_size: int, conditioning: Conditioning) -> Iterator[list[GenRequest]]:
    """Runs of neighbours that can be drawn together, cut at batch_size."""

    def together(request: GenRequest) -> Any:
        sources = len(request.control), request.image is None, request.mask is None
        return request.settings(), sources, conditioning.num_positions(request)

    for _, neighbours in groupby(requests, key=together):
        run = list(neighbours)
        for start in range(0, len(run), batch_size):
            yield run[start : start + batch_size]


def _drawn(stage: Stage, batch: list[GenRequest]) -> Tensor:
    """Latents (B, 4, h, w), scaled, float32, of requests that can be drawn together."""
    return stage.draw(batch, *init_latents(stage.bundle, batch))


def _decoded(bundle: ModelBundle, latents: Tensor, at_once: int) -> Iterator[Image.Image]:
    """Pictures of scaled latents, `at_once` of them in memory."""
    for part in latents.split(at_once):
        pixels = sdxl.decode_latents(bundle.vae, part / bundle.scaling_factor).float()
        values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        for picture in values.permute(0, 2, 3, 1).cpu().numpy():
            yield Image.fromarray(np.ascontiguousarray(picture))


@contextmanager
def _on(device: torch.device | str | None, *modules: nn.Module | None) -> Iterator[None]:
    """Modules on a device, afterwards back where they were."""
    present = [module for module in modules if module is not None]
    homes = [next(module.parameters()).device for module in present]
    try:
        if device is not None:
            for module in present:
                module.to(device)
        yield
    finally:
        for module, home in zip(present, homes, strict=True):
            module.to(home)

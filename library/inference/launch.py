"""From requests to pictures: encodes prompts, batches what can be drawn together, denoises, decodes."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from library.inference.decoding import Decoder
from library.inference.deep_shrink import Shrinking
from library.inference.effect_checks import check_effects
from library.inference.followers import Follower
from library.inference.highres import enlarged, first_stage, second_stage
from library.inference.network_set import at_strengths
from library.inference.regional import only_of
from library.inference.request import GenRequest
from library.inference.source_pictures import init_latents
from library.inference.stage import Stage, with_seeds
from library.inference.texts import TEXTS_TOGETHER, Conditioning, TextForm
from library.log import Console
from library.models.bundle import ModelBundle

TEXTS_AT_ONCE = 256  # pictures whose prompts are encoded before they are drawn
TEXTS_KEPT = 4 * TEXTS_AT_ONCE  # encoded texts that are kept for later pictures: below 1 GiB in float32
BAR_DELAY = 2.0  # seconds before a progress bar shows: shorter work needs none


@torch.no_grad()
def encode_requests(
    bundle: ModelBundle,
    requests: Sequence[GenRequest],
    *,
    device: torch.device | str | None = None,
    text_form: TextForm | Literal["generate", "train"] = "generate",
    networks: Sequence[Any] = (),
    followers: Sequence[Follower] = (),
) -> Conditioning:
    """Encode what the requests say, equal prompts once; the result is on the CPU.

    Afterwards the text encoders are not needed to draw these requests. They work on `device` (None: where they are)
    and are put back. A prompt's encoding does not depend on the others: on a GPU they are encoded one by one.
    followers: those that `generate` is given; networks that act in parts of the picture divide its prompts too.
    """
    form = TextForm(text_form) if isinstance(text_form, str) else text_form
    conditioning = Conditioning(form, only=only_of(followers))
    encode_missing(bundle, requests, conditioning, device=device, networks=networks)
    return conditioning


def encode_missing(
    bundle: ModelBundle,
    requests: Sequence[GenRequest],
    conditioning: Conditioning,
    *,
    device: torch.device | str | None = None,
    networks: Sequence[Any] = (),
) -> None:
    """Add what the requests say and the conditioning does not hold; without such, the encoders are left alone."""
    missing = [request for request in requests if not conditioning.holds(request)]
    if not missing:
        return
    bar = tqdm(desc="encoding prompts", total=len(missing), delay=BAR_DELAY, leave=False, disable=None, file=Console())
    with bar, _on(device, bundle.text_encoder_1, bundle.text_encoder_2):
        for muls, alike in groupby(missing, key=lambda request: request.network_muls):
            with at_strengths(networks, muls):
                for some in _runs(list(alike), TEXTS_TOGETHER):
                    conditioning.add(bundle, some)
                    bar.update(len(some))
    conditioning.forget(requests)


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

    With a request that is drawn in two sizes, the smaller picture comes before it where it is wanted; `stage` tells
    which is which. Neighbours that agree in size, steps and so on are drawn together, up to batch_size; the VAE decodes
    vae_batch_size of them at once. device: where to compute (None: where the U-Net is). conditioning: the encoded
    requests, when the text encoders are busy or gone, to which what is missing is added; or the form in which they are
    encoded here (None: a generator's). networks: those whose strength the requests' network_muls set. followers: what
    else acts on the U-Net, such as networks with control images. Models should be in eval mode; the dtype is theirs.

    A picture's noise depends on its seed alone, and on a CPU so do all of its bits (batch_invariance.py). On a GPU its
    numbers can differ in the last bits with the size of the batch it is drawn in, since matrix products do.
    """
    check_effects(requests, bundle, followers)
    if not isinstance(conditioning, Conditioning):
        conditioning = Conditioning(conditioning or TextForm(), max_rows=TEXTS_KEPT, only=only_of(followers))
    assert conditioning.only == only_of(followers), "the texts are encoded for other followers"
    requests, followers = with_seeds(requests), [*followers, Shrinking(bundle.unet)]
    total, at_once = sum(num_steps(request) for request in requests), vae_batch_size or batch_size
    bar = tqdm(total=total, desc="drawing", unit="step", delay=BAR_DELAY, leave=False, disable=None, file=Console())
    waiting: deque[tuple[Sequence[GenRequest], Callable[[], list[Image.Image]]]] = deque()
    with bar, Decoder(bundle, at_once) as decoder:
        for part in _parts(requests, batch_size):
            encode_missing(bundle, part, conditioning, device=device, networks=networks)
            with _on(device, bundle.unet, bundle.vae):
                for batch in batches(part, batch_size, conditioning.layout):
                    if batch[0].image is not None or batch[0].highres is not None:
                        decoder.wait()
                    with at_strengths(networks, batch[0].network_muls):
                        drawn = list(_drawn(Stage(bundle, conditioning, followers, bar), batch, at_once))
                    waiting += [(made, decoder.begin(latents)) for made, latents in drawn]
                    while len(waiting) > (1 if decoder.beside else 0):
                        yield from _pictures(*waiting.popleft())
                while waiting:
                    yield from _pictures(*waiting.popleft())


def _pictures(
    made: Sequence[GenRequest], wait: Callable[[], list[Image.Image]]
) -> Iterator[tuple[GenRequest, Image.Image]]:
    yield from zip(made, wait(), strict=True)


def _parts(requests: Sequence[GenRequest], batch_size: int) -> Iterator[Sequence[GenRequest]]:
    """Requests in parts whose texts are encoded together; none ends within a batch."""
    start = alike = 0
    for end, request in enumerate(requests):
        alike = alike + 1 if end > start and request.settings() == requests[end - 1].settings() else 1
        if end - start >= TEXTS_AT_ONCE and (alike - 1) % batch_size == 0:
            yield requests[start:end]
            start, alike = end, 1
    if requests:
        yield requests[start:]


def batches(
    requests: Sequence[GenRequest], batch_size: int, layout: Callable[[GenRequest], Any]
) -> Iterator[list[GenRequest]]:
    """Runs of neighbours that can be drawn together, cut at batch_size. layout: of a request's texts."""

    def together(request: GenRequest) -> Any:
        sources = len(request.control), request.image is None, request.mask is None
        return request.settings(), sources, layout(request)

    for _, neighbours in groupby(requests, key=together):
        yield from _runs(list(neighbours), batch_size)


def _runs(requests: list[GenRequest], longest: int) -> Iterator[list[GenRequest]]:
    for start in range(0, len(requests), longest):
        yield requests[start : start + longest]


def _drawn(stage: Stage, batch: list[GenRequest], vae_batch_size: int) -> Iterator[tuple[Sequence[GenRequest], Tensor]]:
    """Requests that can be drawn together with their latents (B, 4, h, w), scaled, float32; once or, in two sizes,
    with the smaller pictures before.
    """
    bundle, highres = stage.bundle, batch[0].highres
    if highres is None:
        yield batch, stage.draw(batch, *init_latents(bundle, batch))
        return
    small, whole = [first_stage(request) for request in batch], [second_stage(request) for request in batch]
    latents = stage.draw(small, *init_latents(bundle, small))
    if highres.save_first:
        yield small, latents
    over = enlarged(bundle, latents, batch[0].size, highres, vae_batch_size=vae_batch_size)
    old, mask = init_latents(bundle, whole)
    if old is not None and mask is not None:  # what stays was only small for a while
        over = mask.to(over) * over + (1 - mask.to(over)) * old.to(over)
    latents = stage.draw(whole, over, mask)
    yield [replace(request, stage="1") for request in batch], latents  # with the seed that draws it again


def num_steps(request: GenRequest) -> int:
    """The steps that a request takes in all."""
    if request.highres is None:
        return request.steps if request.image is None else request.steps_over
    return num_steps(replace(first_stage(request), highres=None)) + request.steps_over


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

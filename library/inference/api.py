"""Drawing from Python in a few lines, with prompt lines like those of sdxl_gen_img.py (docs/prompts.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from library.inference.adapters import load_networks
from library.inference.embeddings import add_words, read_words
from library.inference.launch import TEXTS_KEPT, generate
from library.inference.loading import Loading, load_for_drawing
from library.inference.network_set import check_strengths
from library.inference.plan import PlanOptions, plan
from library.inference.prompt_source import PromptLine
from library.inference.request import OPEN, GenRequest, with_open_sides
from library.inference.request_checks import check_samplers, check_strengths_act
from library.inference.source_pictures import with_image_size
from library.inference.texts import Conditioning, TextForm
from library.io.safetensors_file import TensorReader
from library.models.bundle import ModelBundle
from library.sizes import Size
from networks._files import format_of

DEFAULTS = GenRequest(size=Size(OPEN, OPEN), steps=30, sampler="euler_a")


@dataclass
class Model:
    """A loaded model, its networks, and the texts that it has encoded so far."""

    bundle: ModelBundle
    networks: Sequence[Any] = ()
    texts: Conditioning = field(default_factory=lambda: Conditioning(TextForm(), max_rows=TEXTS_KEPT))


def load(
    ckpt: str,
    *,
    networks: Mapping[str, float] | None = None,
    embeddings: Sequence[str] = (),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    max_chunks: int = 1,
) -> Model:
    """A model from a checkpoint file, a diffusers folder, a hub id or `tiny`.

    networks: files of this suite's kinds (LoRA, DoRA and so on) with their strengths. embeddings: files whose names
    become words. device: None for the best there is. dtype: None for float16 on CUDA, where the VAE falls back to
    float32 for the pictures that need it, else float32. max_chunks: the longest prompt, in chunks of 75 tokens.
    Raises UserError for files that are missing, broken or made for another model.
    """
    files = networks or {}
    words = read_words(embeddings, networks=list(files))
    kinds = []
    for path in files:
        with TensorReader(Path(path)) as tensors:
            kinds.append(format_of(tensors).kinds[0])
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    how = Loading(dtype or (torch.float16 if cuda else torch.float32))
    bundle = load_for_drawing(ckpt, how, device=device)
    loaded = load_networks(bundle, modules=kinds, weights=list(files), muls=list(files.values()))
    add_words(bundle, words)
    return Model(bundle, loaded, Conditioning(TextForm("generate", max_chunks), max_rows=TEXTS_KEPT))


def draw(
    model: Model,
    prompts: Sequence[str],
    *,
    seed: int | None = None,
    images_per_prompt: int = 1,
    batch_size: int = 1,
    defaults: GenRequest = DEFAULTS,
) -> Iterator[tuple[GenRequest, Image.Image]]:
    """Draw prompt lines (docs/prompts.md) and yield each picture with its request, prompt after prompt.

    seed: of a single picture, or of the list of their seeds; None: random ones, which the requests tell. defaults: what
    the lines leave open, such as steps, sampler or an `image` to draw over, a path or a picture.
    Raises UserError, before anything is drawn, for lines that cannot be read or cannot act.
    """
    lines = [PromptLine(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, start=1)]
    planned = plan(lines, defaults, PlanOptions(images_per_prompt=images_per_prompt, seed=seed))
    native = model.bundle.native_size
    requests = [with_open_sides(with_image_size(request), native) for request in planned]
    check_strengths(requests, model.networks, merged=False)
    check_strengths_act(requests)
    check_samplers(requests, model.bundle)
    return generate(model.bundle, requests, batch_size=batch_size, conditioning=model.texts, networks=model.networks)

"""What sdxl_gen_img.py does: reads the prompts, loads the model and its networks, draws, writes."""

import random
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.errors import UserError
from library.inference.controls import check_models, guide_images, load_controls, with_guides
from library.inference.embeddings import add_words, read_words
from library.inference.launch import encode_requests, generate
from library.inference.network_set import check_strengths, load_set
from library.inference.prediction import settle
from library.inference.prompt_line import CELL, MAX_SEED, GenRequest, parse_line, read_lines
from library.inference.samplers import make_scheduler
from library.inference.texts import TextForm
from library.inference.writer import PictureWriter
from library.log import get_logger
from library.models import attention
from library.models.bundle import ModelBundle
from library.models.checkpoint import load_bundle
from library.sizes import Size

if TYPE_CHECKING:
    from library.config.generate import GenerateOptions
    from library.config.run_config import RunConfig

logger = get_logger(__name__)


def run(cfg: "RunConfig") -> list[Path]:
    """Draw everything that the configuration asks for and return the pictures' paths, in order."""
    options: GenerateOptions = cfg.generate
    lines = read_lines(Path(options.from_file)) if options.from_file else [options.prompt]
    words = read_words(options.textual_inversion_embeddings, networks=options.network_weights)
    guides = guide_images(options)
    check_models(options)
    bundle = _load(cfg)
    controls = load_controls(bundle, options)
    networks = load_set(bundle, options)
    add_words(bundle, words)
    defaults = GenRequest(
        size=_size(options, bundle),
        steps=options.steps,
        scale=options.scale,
        sampler=options.sampler,
        eta=options.eta,
        negative_scale=options.negative_scale,
        guidance_rescale=options.guidance_rescale,
    )
    pictures = plan(
        [parse_line(line, defaults) for line in lines],
        images_per_prompt=options.images_per_prompt,
        n_iter=options.n_iter,
        seed=options.seed,
    )
    requests = with_guides(list(pictures), guides)
    check_strengths(requests, networks, merged=bool(options.network_weights))
    _check_samplers(requests, bundle)
    writer = PictureWriter(Path(options.outdir), sequential=options.sequential_file_name)
    form = TextForm("generate", options.max_embeddings_multiples or 1)
    conditioning = encode_requests(bundle, requests, text_form=form, networks=networks)
    drawn = generate(
        bundle,
        requests,
        batch_size=options.batch_size,
        vae_batch_size=_vae_batch_size(options),
        conditioning=conditioning,
        networks=networks,
        controls=controls,
    )
    logger.info("drawing %d pictures with %s", len(requests), options.ckpt)
    try:
        for request, picture in drawn:
            writer.write(request, picture)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the memory of the device is too small: {str(error).splitlines()[0]}",
            fix="lower batch_size, vae_batch_size or the size, or compute in fp16 or bf16",
        ) from error
    return writer.paths


def plan(
    prompts: Sequence[GenRequest], *, images_per_prompt: int, n_iter: int, seed: int | None
) -> Iterator[GenRequest]:
    """Every picture of a run with its seed: the whole list n_iter times, each prompt images_per_prompt times.

    A picture takes its prompt's `--d` seed; where there is none, a run with one picture takes `seed`, with several
    the next number of sd-scripts' stream `random.Random(seed).randint(0, 2^31 - 1)`, and without `seed` a random one.
    """
    total = len(prompts) * images_per_prompt * n_iter
    stream = random.Random(seed)
    for _ in range(n_iter):
        for prompt in prompts:
            for index in range(images_per_prompt):
                if index < len(prompt.seeds):
                    chosen = prompt.seeds[index]
                elif seed is None:
                    chosen = secrets.randbelow(MAX_SEED + 1)
                else:
                    chosen = seed if total == 1 else stream.randint(0, MAX_SEED)
                yield replace(prompt, seed=chosen)


def _check_samplers(requests: Sequence[GenRequest], bundle: ModelBundle) -> None:
    """Raise UserError for a picture that its sampler cannot draw, before any is drawn."""
    kind, table = bundle.prediction_type, bundle.schedule
    for sampler, steps, eta in dict.fromkeys((request.sampler, request.steps, request.eta) for request in requests):
        make_scheduler(sampler, prediction_type=kind, steps=steps, schedule=table, eta=eta)


def _load(cfg: "RunConfig") -> ModelBundle:
    options: GenerateOptions = cfg.generate
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else torch.float32
    bundle = load_bundle(
        options.ckpt,
        vae=options.vae,
        dtype=dtype,
        dtypes={"vae": torch.float32} if options.no_half_vae else None,
        device=device,
    )
    attention.configure(bundle.unet, xformers=options.xformers, device=device)
    settle(cfg, bundle)
    return bundle


def _size(options: "GenerateOptions", bundle: ModelBundle) -> Size:
    """The size asked for; what is left open is the size that the model was made for: 1024 for SDXL, 128 for `tiny`."""
    native = bundle.arch.facts.sample_size * CELL
    return Size(options.W or native, options.H or native)


def _vae_batch_size(options: "GenerateOptions") -> int | None:
    size = options.vae_batch_size
    if size is None:
        return None
    return max(1, int(size * options.batch_size if size < 1 else size))

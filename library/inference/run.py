"""What sdxl_gen_img.py does: reads the prompts, loads the model and its networks, draws, writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.errors import UserError
from library.inference.album import Album, Job
from library.inference.control_nets import check_control_nets, load_control_nets
from library.inference.controls import check_models, guide_images, load_controls, with_guides
from library.inference.effect_checks import check_effects, check_effects_asked_for
from library.inference.embeddings import add_words, check_words, read_words
from library.inference.followers import Follower
from library.inference.grid import plan_grid, read_axes
from library.inference.image_prompts import ImagePrompts, check_image_prompts, image_prompts
from library.inference.interactive import ask_and_draw
from library.inference.launch import TEXTS_KEPT, batches, encode_missing, generate
from library.inference.loading import Loading, best_device, compile_blocks, load_for_drawing
from library.inference.network_set import check_strengths, load_set
from library.inference.parameters_text import num_live
from library.inference.plan import PlanOptions, plan
from library.inference.prediction import settle
from library.inference.ranks import share_of
from library.inference.regional import only_of, read_regions
from library.inference.request import GenRequest, with_open_sides
from library.inference.request_checks import check_samplers, check_strengths_act
from library.inference.settings import defaults_of, lines_and_sources
from library.inference.source_pictures import with_sources
from library.inference.texts import Conditioning, TextForm
from library.inference.wildcards import Wildcards
from library.log import get_logger
from library.models.bundle import ModelBundle
from library.models.checkpoint import read_arch

if TYPE_CHECKING:
    from library.config.generate import GenerateOptions
    from library.config.run_config import RunConfig

logger = get_logger(__name__)


def run(cfg: "RunConfig") -> list[Path]:
    """Draw everything that the configuration asks for and return the pictures' paths, in order.

    With `interactive`, prompts are asked for afterwards until the input ends.
    """
    for notice in cfg.notices:
        logger.info(notice)
    options: GenerateOptions = cfg.generate
    share = share_of(cfg)
    lines, sources = lines_and_sources(cfg)
    wildcards = Wildcards(options.wildcard_dir)
    defaults, regions = defaults_of(cfg), read_regions(cfg)
    how = PlanOptions(
        images_per_prompt=options.images_per_prompt,
        n_iter=options.n_iter,
        seed=options.seed,
        iter_same_seed=options.iter_same_seed,
        shuffled=options.shuffle_prompts,
        regions=regions.count if regions else 0,
        repeatable=cfg.pictures.resume_bulk or cfg.pictures.prompts_per_rank,
    )
    grid = None
    if cfg.pictures.grid:
        axes = read_axes(cfg.pictures.grid, num_networks=num_live(options))
        grid = plan_grid(lines, axes, defaults, how, wildcards=wildcards)
    pictures = grid.requests if grid else plan(lines, defaults, how, wildcards=wildcards)
    check_strengths_act(pictures, over_pictures=bool(sources[0]))
    check_samplers(pictures)
    check_strengths(pictures, [None] * num_live(options), merged=bool(options.network_weights))
    check_effects_asked_for(cfg, pictures)
    words = read_words(options.textual_inversion_embeddings, networks=options.network_weights)
    guides = guide_images(cfg)
    arch = read_arch(options.ckpt)
    check_models(options, arch)
    check_control_nets(cfg, arch)
    check_image_prompts(cfg, arch)
    if arch is not None:
        check_words(words, arch)
    bundle = _load(cfg, local_rank=share.local_rank)
    album = Album(cfg, share=share)
    controls, networks = load_controls(bundle, options), load_set(bundle, options)
    followers = [controls, load_control_nets(bundle, cfg)]
    followers += [regions.follower(bundle.unet, networks)] if regions else []
    form = TextForm("generate", options.max_embeddings_multiples or 1, cfg.told.emb_normalize_mode)
    texts = Conditioning(form, max_rows=TEXTS_KEPT, only=only_of(followers))
    studio = _Studio(bundle, options, followers, networks, guides, sources, album, texts, image_prompts(cfg))
    add_words(bundle, words)
    if cfg.drawing_speed.compile:
        compile_blocks(bundle)
    job = studio.draw(pictures)
    if grid:
        album.add_sheets(grid.sheets, job)
    if options.interactive:
        ask_and_draw(lambda line: studio.draw(plan([line], defaults, how, wildcards=wildcards)).paths)
    return album.paths


@dataclass
class _Studio:
    """A loaded model with its networks and control images, and the folder that its pictures go to."""

    bundle: ModelBundle
    options: "GenerateOptions"
    followers: Sequence[Follower]
    networks: Sequence[Any]
    guides: Sequence[tuple[str, ...]]
    sources: tuple[Sequence[str], Sequence[str]]
    album: Album
    texts: Conditioning
    image_prompts: ImagePrompts | None = None

    def draw(self, pictures: Sequence[GenRequest]) -> Job:
        """Draw pictures, which are written when it returns. UserError when the memory of the device is too small."""
        options = self.options
        native = self.bundle.native_size
        over = with_sources(pictures, *self.sources, start=self.album.count)
        sized = [with_open_sides(picture, native) for picture in over]
        requests = with_guides(sized, self.guides, start=self.album.count)
        check_strengths(requests, self.networks, merged=bool(options.network_weights))
        check_strengths_act(requests)
        check_samplers(requests, self.bundle)
        check_effects(requests, self.bundle, self.followers, told=False)
        job = self.album.job(requests, lambda: self._batches(requests))
        if self.image_prompts:
            self.texts.pictures |= self.image_prompts.vectors(self.bundle, job.todo)
        drawn = generate(
            self.bundle,
            job.todo,
            batch_size=options.batch_size,
            vae_batch_size=_vae_batch_size(options),
            conditioning=self.texts,
            networks=self.networks,
            followers=self.followers,
        )
        if job.todo:
            logger.info("drawing %d pictures with %s", len(job.todo), options.ckpt)
        try:
            with job:
                for request, picture in drawn:
                    job.take(request, picture)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the memory of the device is too small: {str(error).splitlines()[0]}",
                fix="lower batch_size, vae_batch_size or the size, or compute in fp16 or bf16",
            ) from error
        return job

    def _batches(self, requests: Sequence[GenRequest]) -> list[int]:
        """How many requests are drawn at once, batch after batch."""

        def layout(request: GenRequest) -> tuple[int, int]:
            if self.texts.form.max_chunks > 1:  # how long prompts are decides who goes with whom
                encode_missing(self.bundle, [request], self.texts, networks=self.networks)
            return self.texts.layout(request)

        return [len(batch) for batch in batches(requests, self.options.batch_size, layout)]


def _load(cfg: "RunConfig", *, local_rank: int = 0) -> ModelBundle:
    options, speed = cfg.generate, cfg.drawing_speed
    how = Loading(
        torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else torch.float32,
        vae=options.vae,
        vae_float32=options.no_half_vae,
        xformers=options.xformers,
        channels_last=speed.opt_channels_last,
        tiling=speed.vae_tiling,
    )
    bundle = load_for_drawing(options.ckpt, how, device=best_device(local_rank))
    settle(cfg, bundle)
    return bundle


def _vae_batch_size(options: "GenerateOptions") -> int | None:
    size = options.vae_batch_size
    if size is None:
        return None
    return max(1, int(size * options.batch_size if size < 1 else size))

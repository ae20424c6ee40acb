"""Whether Deep Shrink and Gradual Latent can act on the pictures of a run, before any of them is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.config.choices import split_sampler
from library.errors import UserError
from library.inference.controls import Controls
from library.inference.deep_shrink import count_blocks
from library.inference.effects import Cells, skip_sizes
from library.inference.followers import Follower
from library.inference.highres import first_stage
from library.inference.request import CELL, GenRequest
from library.inference.samplers import make_scheduler
from library.log import get_logger
from library.models.bundle import ModelBundle

if TYPE_CHECKING:
    from library.config.run_config import RunConfig

logger = get_logger(__name__)


def check_effects_asked_for(cfg: RunConfig, requests: Sequence[GenRequest]) -> None:
    """Before the model is loaded: raise UserError for Deep Shrink with LLLites, and warn of options without effect.

    Those are options of an effect that no prompt has; what will be typed is not known.
    """
    if cfg.generate.control_net_lllite_models:
        for request in requests:
            _refuse_lllites(request)
    for start, name, depth, is_on in (
        ("ds_", "Deep Shrink", "ds_depth_1, or --dsd1", any(request.deep_shrink.is_on for request in requests)),
        (
            "gradual_latent_",
            "Gradual Latent",
            "gradual_latent_timesteps, or --glt",
            any(request.gradual_latent.is_on for request in requests),
        ),
    ):
        given = [option for option in type(cfg.unet_effects).options() if option.startswith(start)]
        for option in filter(cfg.is_given, [] if is_on or cfg.generate.interactive else given):
            logger.warning("%s has no effect: no prompt has %s (%s in a prompt)", option, name, depth)


def check_effects(
    requests: Sequence[GenRequest], bundle: ModelBundle, followers: Sequence[Follower] = (), *, told: bool = True
) -> None:
    """Raise UserError for pictures that cannot have Deep Shrink or Gradual Latent.

    told: warn of a shrink that never acts.
    """
    drawn = [request for request in requests if request.deep_shrink.is_on or request.gradual_latent.is_on]
    drawn = [request if request.highres is None else first_stage(request) for request in drawn]
    for request in {(request.settings(), request.image is not None): request for request in drawn}.values():
        full = Cells(request.size.h // CELL, request.size.w // CELL)
        if request.gradual_latent.is_on:
            full = _check_gradual(request, bundle, full)
        if request.deep_shrink.is_on and any(isinstance(one, Controls) and one.controls for one in followers):
            _refuse_lllites(request)
        if request.deep_shrink.is_on:
            _check_shrink(request, bundle, full)
            if told:
                _warn_of_no_shrink(request, bundle)


def _refuse_lllites(request: GenRequest) -> None:
    if request.deep_shrink.is_on:
        fix = "leave one of them out; ControlNets (control_net_models) go with it"
        raise UserError("a LLLite does not fit the maps that Deep Shrink makes", request.raw or "deep_shrink", fix)


def _timesteps(request: GenRequest, bundle: ModelBundle) -> list[float]:
    scheduler = make_scheduler(
        request.sampler,
        prediction_type=bundle.prediction_type,
        steps=request.steps,
        schedule=bundle.schedule,
        eta=request.eta,
    )
    return scheduler.timesteps.tolist()


def _check_gradual(request: GenRequest, bundle: ModelBundle, full: Cells) -> Cells:
    """The smallest latents of a picture that can be drawn with Gradual Latent."""
    settings, name = request.gradual_latent, "gradual_latent"
    if split_sampler(request.sampler)[0] != "euler_a":
        raise UserError(f"Gradual Latent is for euler_a, not for {request.sampler}", name, "take sampler euler_a")
    if request.image is not None:
        what = "Gradual Latent begins with a small picture of noise, so it cannot draw over a picture"
        raise UserError(what, name, "leave one of the two out")
    start, least = settings.start_size(full), 1 if settings.unsharp is None else settings.unsharp.ksize // 2 + 1
    if min(start) < least:
        what = f"{settings.ratio:g} of a picture of {request.size.w}x{request.size.h} is too small to start from"
        raise UserError(what, name, "raise gradual_latent_ratio (--glr), or draw a larger picture")
    sizes = [size for size in settings.growth(full, _timesteps(request, bundle)) if size is not None]
    if not sizes or sizes[-1] != full:
        last = sizes[-1] if sizes else start
        raise UserError(
            f"in {request.steps} steps Gradual Latent comes to {last.w * CELL}x{last.h * CELL} pixels, not to "
            f"{request.size.w}x{request.size.h}",
            name,
            "take more steps, or grow earlier (gradual_latent_timesteps, --glt), more often "
            "(gradual_latent_every_n_steps, --gle) or faster (gradual_latent_ratio_step, --gls)",
        )
    return start


def _check_shrink(request: GenRequest, bundle: ModelBundle, smallest: Cells) -> None:
    settings, halves = request.deep_shrink, count_blocks(bundle.unet)
    for depth in (settings.depth_1, settings.depth_2):
        if depth is None:
            continue
        if depth >= len(halves):
            what = f"Deep Shrink at depth {depth}: this model has the depths 0 to {len(halves) - 1}"
            raise UserError(what, "deep_shrink", "take one of them")
        if min(map(min, skip_sizes(smallest, halves, depth=depth, ratio=settings.ratio))) < 1:
            what = f"Deep Shrink by {settings.ratio:g} at depth {depth} leaves nothing of"
            fix = "take a smaller depth or a larger ratio, or draw a larger picture"
            raise UserError(f"{what} {request.size.w}x{request.size.h} pixels", "deep_shrink", fix)
    if settings.depth_2 is not None and settings.timesteps_2 >= settings.timesteps_1:
        what = f"from timestep {settings.timesteps_1} down to {settings.timesteps_2} there is nothing"
        raise UserError(f"the second depth of Deep Shrink never acts: {what}", "deep_shrink", "lower ds_timesteps_2")


def _warn_of_no_shrink(request: GenRequest, bundle: ModelBundle) -> None:
    settings, done = request.deep_shrink, _timesteps(request, bundle)
    if request.image is not None:
        done = done[len(done) - len(done) * request.steps_over // request.steps :]
    if all(settings.depth_at(t) is None for t in done):
        lowest = settings.timesteps_1 if settings.depth_2 is None else min(settings.timesteps_1, settings.timesteps_2)
        logger.warning("Deep Shrink never acts: no step is at a timestep of %d or above", lowest)

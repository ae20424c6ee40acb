"""From the options of a run to what its prompts leave open, and to the files that its pictures are drawn over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.config.key_values import split_pairs
from library.config.regional_networks import num_regional
from library.config.unsharp import parse_unsharp
from library.inference.effects import DeepShrink, GradualLatent
from library.inference.highres import load_upscaler
from library.inference.picture_text import prompts_of_pictures
from library.inference.plan import Lines
from library.inference.prompt_module import prompt_module
from library.inference.prompt_source import prompt_lines
from library.inference.request import OPEN, GenRequest, HighresFix
from library.inference.source_pictures import picture_files
from library.sizes import Size

if TYPE_CHECKING:
    from library.config.run_config import RunConfig
    from library.config.unet_effects import UNetEffectOptions


def defaults_of(cfg: RunConfig) -> GenRequest:
    """What a prompt leaves open. UserError for an upscaler module that cannot be used."""
    options, over, told = cfg.generate, cfg.img2img, cfg.told
    return GenRequest(
        size=Size(options.W or OPEN, options.H or OPEN),
        steps=options.steps,
        scale=options.scale,
        sampler=options.sampler,
        eta=options.eta,
        negative_scale=options.negative_scale,
        guidance_rescale=options.guidance_rescale,
        original_width=told.original_width,
        original_height=told.original_height,
        original_width_negative=told.original_width_negative,
        original_height_negative=told.original_height_negative,
        crop_top=told.crop_top,
        crop_left=told.crop_left,
        strength=over.strength,
        highres=_highres(cfg) if over.highres_fix_scale else None,
        **_effects(cfg.unet_effects),
    )


def _effects(options: UNetEffectOptions) -> dict[str, Any]:
    """The fields of a request that say what happens to sizes while it is drawn."""
    unsharp = options.gradual_latent_unsharp_params
    return {
        "deep_shrink": DeepShrink(
            depth_1=options.ds_depth_1,
            timesteps_1=options.ds_timesteps_1,
            depth_2=options.ds_depth_2,
            timesteps_2=options.ds_timesteps_2,
            ratio=options.ds_ratio,
        ),
        "gradual_latent": GradualLatent(
            timesteps=options.gradual_latent_timesteps,
            ratio=options.gradual_latent_ratio,
            ratio_step=options.gradual_latent_ratio_step,
            every_n_steps=options.gradual_latent_every_n_steps,
            s_noise=options.gradual_latent_s_noise,
            unsharp=None if unsharp is None else parse_unsharp(unsharp),
        ),
    }


def _highres(cfg: RunConfig) -> HighresFix:
    over = cfg.img2img
    arguments = split_pairs(part for part in (over.highres_fix_upscaler_args or "").split(";") if part.strip())
    return HighresFix(
        over.highres_fix_scale or 1.0,
        steps=over.highres_fix_steps,
        strength=over.highres_fix_strength,
        latents=over.highres_fix_latents_upscaling,
        upscaler=load_upscaler(over.highres_fix_upscaler, arguments) if over.highres_fix_upscaler else None,
        without_control=over.highres_fix_disable_control_net,
        save_first=over.highres_fix_save_1st,
    )


def lines_and_sources(cfg: RunConfig) -> tuple[Lines, tuple[list[str], list[str]]]:
    """What a run is to draw before anyone is asked, and the files that it is drawn over, with their masks.

    Where nothing says what, the prompts are those that the pictures to draw over hold, and each picture goes with the
    images_per_prompt results of its own prompt (gen_img.md section 2). UserError for files that hold no picture or no
    prompt.
    """
    options, sources = cfg.generate, sources_of(cfg)
    lines = prompt_module(cfg) or prompt_lines(options.from_file, options.prompt)
    if lines or not sources[0] or options.interactive:
        return lines, sources
    images, masks = ([path for path in paths for _ in range(options.images_per_prompt)] for paths in sources)
    return prompts_of_pictures(sources[0]), (images, masks)


def sources_of(cfg: RunConfig) -> tuple[list[str], list[str]]:
    """The files that are drawn over, and their masks; UserError for what holds no picture.

    A mask that says where networks act is none of them.
    """
    over = cfg.img2img
    images = picture_files([over.image_path], option="image_path") if over.image_path else []
    masks = over.mask_path if not num_regional(cfg) else None
    return images, picture_files([masks], option="mask_path") if masks else []

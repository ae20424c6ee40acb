"""Rules about drawing over pictures and in two sizes."""

from __future__ import annotations

from library.config.fields import GENERATOR
from library.config.regional_networks import num_regional
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem

_OF_HIGHRES = (
    "highres_fix_steps",
    "highres_fix_strength",
    "highres_fix_save_1st",
    "highres_fix_latents_upscaling",
    "highres_fix_upscaler",
    "highres_fix_upscaler_args",
    "highres_fix_disable_control_net",
)


@rule(
    "image_path",
    "mask_path",
    "strength",
    "use_original_file_name",
    "highres_fix_scale",
    "network_weights",
    "network_merge",
    "network_merge_n_models",
    runs=GENERATOR,
)
def there_is_a_picture_to_draw_over(cfg: RunConfig) -> list[Problem]:
    """What is said about drawing over a picture needs one."""
    options, problems = cfg.img2img, []
    if options.image_path:
        return []
    if options.mask_path and not num_regional(cfg):
        fix = "name image_path, or network_weights that are not merged and act in parts of the picture"
        problems += conflict(cfg, "mask_path cannot act: nothing is drawn over", "mask_path", fix=fix)
    if options.use_original_file_name:
        what = "use_original_file_name cannot act: nothing is drawn over"
        problems += conflict(cfg, what, "use_original_file_name", fix="name image_path")
    if options.strength is not None and not options.highres_fix_scale:
        what = "strength cannot act: nothing is drawn over"
        problems += conflict(cfg, what, "strength", fix="name image_path, or set highres_fix_scale")
    return problems


@rule("highres_fix_scale", "image_path", *_OF_HIGHRES, runs=GENERATOR)
def highres_fix_is_on(cfg: RunConfig) -> list[Problem]:
    """What is said about the smaller picture needs one."""
    options, problems = cfg.img2img, []
    if not options.highres_fix_scale:
        for name in _OF_HIGHRES:
            if cfg.is_given(name) and cfg.get(name):
                what = f"{name} cannot act: there is no smaller picture"
                problems += conflict(cfg, what, name, fix="set highres_fix_scale, such as 0.5")
        return problems
    if options.highres_fix_strength is not None and not options.image_path:
        what = "highres_fix_strength cannot act: the smaller picture is drawn over nothing"
        problems += conflict(cfg, what, "highres_fix_strength", fix="name image_path, or set strength")
    if options.highres_fix_upscaler and options.highres_fix_latents_upscaling:
        names = ("highres_fix_upscaler", "highres_fix_latents_upscaling")
        problems += conflict(cfg, "there are two ways to enlarge the smaller picture", *names, fix="keep one of them")
    if options.highres_fix_upscaler_args and not options.highres_fix_upscaler:
        what = "highres_fix_upscaler_args has no upscaler to act on"
        problems += conflict(cfg, what, "highres_fix_upscaler_args", fix="name highres_fix_upscaler")
    if options.highres_fix_disable_control_net and not cfg.generate.guide_image_path:
        what = "highres_fix_disable_control_net cannot act: there are no control images"
        problems += conflict(cfg, what, "highres_fix_disable_control_net", fix="remove it")
    return problems

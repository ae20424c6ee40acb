"""Rules about ControlNet-LLLite, in training, and about control images in generation."""

from __future__ import annotations

from library.config.fields import GENERATOR, LLLITE
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("masked_loss", runs=LLLITE)
def conditions_are_no_masks(cfg: RunConfig) -> list[Problem]:
    """A subset names one folder of companions, which here are condition images."""
    if not cfg.data.masked_loss:
        return []
    what = "masked_loss cannot act: conditioning_data_dir holds the condition images, so there is no place for masks"
    return conflict(cfg, what, "masked_loss", fix="remove it; alpha_mask takes masks from the images' alpha")


@rule("reg_data_dir", runs=LLLITE)
def regularisation_needs_conditions(cfg: RunConfig) -> list[Problem]:
    """Every image needs a condition, and reg_data_dir has no folder of them beside it."""
    if not cfg.data.reg_data_dir or cfg.data.dataset_config or cfg.data.in_json:
        return []
    what = "reg_data_dir cannot act: its images would need condition images too"
    fix = "describe both in a dataset_config: each subset with its conditioning_data_dir, one with is_reg"
    return conflict(cfg, what, "reg_data_dir", fix=fix)


@rule("learning_rate", runs=LLLITE)
def the_network_has_a_rate(cfg: RunConfig) -> list[Problem]:
    """The network is all that trains."""
    if cfg.optim.learning_rate:
        return []
    return conflict(cfg, "learning_rate is 0, so nothing would train", "learning_rate", fix="set it above 0")


@rule(
    "control_net_lllite_models",
    "control_net_models",
    "control_net_preps",
    "control_net_multipliers",
    "control_net_ratios",
    "guide_image_path",
    runs=GENERATOR,
)
def control_images_and_networks_go_together(cfg: RunConfig) -> list[Problem]:
    """Networks need control images, and what is said about either needs networks."""
    options, problems = cfg.generate, []
    named = [name for name in ("control_net_lllite_models", "control_net_models") if cfg.get(name)]
    count, nets = sum(len(cfg.get(name)) for name in named), len(cfg.control_net.control_net_models)
    if count and not options.guide_image_path:
        fix = "name a control image, or a folder of them, in guide_image_path"
        problems += conflict(cfg, f"{named[0]} have no control image", *named, fix=fix)
    for name in ("control_net_multipliers", "control_net_ratios"):
        if len(cfg.get(name)) > count:
            what = f"{name} has more values than there are control_net_lllite_models and control_net_models ({count})"
            problems += conflict(cfg, what, name, fix="remove some, or name more models")
    if len(cfg.control_net.control_net_preps) > nets:
        what = f"control_net_preps has more values than there are control_net_models ({nets})"
        problems += conflict(cfg, what, "control_net_preps", fix="remove some, or name more models")
    if options.guide_image_path and not count:
        what = "guide_image_path cannot act: no network follows control images"
        fix = "name a file in control_net_models or control_net_lllite_models"
        problems += conflict(cfg, what, "guide_image_path", fix=fix)
    return problems


@rule("control_net_lllite_models", "ds_depth_1", runs=GENERATOR)
def lllites_see_whole_maps(cfg: RunConfig) -> list[Problem]:
    """A LLLite's embedding has a place for each cell of the U-Net's maps, which Deep Shrink makes fewer."""
    if not cfg.generate.control_net_lllite_models or cfg.unet_effects.ds_depth_1 is None:
        return []
    what, names = "a LLLite does not fit the maps that Deep Shrink makes", ("control_net_lllite_models", "ds_depth_1")
    return conflict(cfg, what, *names, fix="leave one of them out; ControlNets (control_net_models) go with it")

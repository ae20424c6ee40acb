"""Rules between options: each fires where it should, and only there."""

import pytest

from library.config import validate
from library.config.cli import make_config, parse
from library.config.conditions import Settings
from library.config.dataset_file import dataset_specs
from library.config.preps import Prep, parse_prep
from library.config.runs import RUNS
from library.errors import UserError

TRAINER_CASES = [
    ("model_is_named", {"pretrained_model_name_or_path": ""}, "pretrained_model_name_or_path is missing"),
    (
        "one_prediction_type",
        {"prediction_type": "epsilon", "v_parameterization": True},
        "name two prediction types",
    ),
    (
        "flow_has_no_terminal_snr",
        {"prediction_type": "rectified_flow", "zero_terminal_snr": True},
        "zero_terminal_snr cannot act on rectified flow",
    ),
    ("only_flow_is_shifted", {"prediction_type": "epsilon", "flow_shift": 3.0}, "not on epsilon"),
    ("only_flow_is_shifted", {"v_parameterization": True, "flow_shift": 3.0}, "not on v_prediction"),
    ("data_is_named", {"train_data_dir": ""}, "there is no data"),
    ("latents_are_cached", {"cache_latents_moments": True}, "cache_latents_moments needs cache_latents"),
    ("latents_are_cached", {"cache_in_background": True}, "cache_in_background needs cache_latents"),
    ("cached_text_is_not_trained", {"cache_text_encoder_outputs": True}, "needs network_train_unet_only"),
    ("cached_text_is_not_trained", {"cache_text_encoder_outputs_to_disk": True}, "needs network_train_unet_only"),
    ("caches_are_on_disk", {"cache_store": "packed"}, "cache_store cannot act: nothing is cached on disk"),
    (
        "variants_are_cached",
        {"text_cache_variants": 4, "shuffle_caption": True},
        "acts with cache_text_encoder_outputs",
    ),
    ("timesteps_are_left", {"min_timestep": 500, "max_timestep": 500}, "no timestep is left"),
    (
        "bias_has_timesteps",
        {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0, "max_timestep": 750},
        "favours none of the timesteps 0 to 749",
    ),
    (
        "bias_has_timesteps",
        {"timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 2.0, "max_timestep": 250},
        "favours all of the timesteps 0 to 249",
    ),
    (
        "bias_has_timesteps",
        {"timestep_bias_strategy": "range", "timestep_bias_begin": 300, "timestep_bias_end": 200},
        "favours none of the timesteps 0 to 999",
    ),
    ("adaptive_scale_has_an_offset", {"adaptive_noise_scale": 0.1}, "adaptive_noise_scale needs noise_offset"),
    ("one_weighting", {"min_snr_gamma": 5.0, "p2_gamma": 1.0}, "min_snr_gamma and p2_gamma are different weightings"),
    ("v_like_loss_is_for_noise", {"v_pred_like_loss": 0.5, "v_parameterization": True}, "a model that predicts noise"),
    (
        "metadata_has_no_regularisation",
        {"in_json": __file__, "reg_data_dir": "reg"},
        "in_json and reg_data_dir cannot be used together",
    ),
    ("one_optimizer", {"use_8bit_adam": True, "optimizer_type": "AdamW"}, "name two optimizers"),
    ("one_optimizer", {"use_8bit_adam": True, "use_lion_optimizer": True}, "name two optimizers"),
    ("one_optimizer", {"use_lion_optimizer": True, "optimizer_type": "Lion8bit"}, "name two optimizers"),
    ("constant_has_no_warmup", {"lr_warmup_steps": 10}, "constant has no warm-up"),
    ("classes_have_no_warmup", {"lr_scheduler_type": "StepLR", "lr_warmup_steps": 10}, "no warm-up of its own"),
    ("piecewise_needs_rules", {"lr_scheduler": "piecewise_constant"}, "needs step_rules"),
    ("floor_is_given", {"lr_scheduler": "cosine_with_min_lr"}, "needs a floor"),
    (
        "floor_is_given",
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler_args": ["min_lr=1e-6"]},
        "names its floor 2 times",
    ),
    ("adafactor_sets_the_rate", {"lr_scheduler": "adafactor"}, "only with the relative steps of Adafactor"),
    (
        "adafactor_sets_the_rate",
        {"lr_scheduler": "adafactor", "optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]},
        "only with the relative steps of Adafactor",
    ),
    (
        "one_rate_for_all",
        {"optimizer_type": "Prodigy", "learning_rate": 1.0, "text_encoder_lr": [0.5]},
        "takes one learning rate",
    ),
    (
        "one_rate_for_all",
        {"optimizer_type": "prodigyopt.Prodigy", "network_train_unet_only": False, "unet_lr": 1.0},
        "takes one learning rate",
    ),
    ("one_rate_for_all", {"optimizer_type": "DAdaptLion", "text_encoder_lr": [1.0, 0.5]}, "takes one learning rate"),
    (
        "d_adapt_sgd_starts_at_full_rate",
        {"optimizer_type": "DAdaptSGD", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0.1},
        "rate 0 of a warm-up",
    ),
    (
        "something_is_trained",
        {"network_train_unet_only": True, "network_train_text_encoder_only": True},
        "leave nothing to train",
    ),
    ("full_precisions_compute_in_their_own", {"full_bf16": True}, "full_bf16 needs mixed_precision bf16, not no"),
    (
        "full_precisions_compute_in_their_own",
        {"full_fp16": True, "mixed_precision": "bf16"},
        "full_fp16 needs mixed_precision fp16, not bf16",
    ),
    ("eight_bits_compute_in_sixteen", {"fp8_base": True}, "fp8_base needs mixed_precision bf16 or fp16"),
    ("eight_bits_compute_in_sixteen", {"fp8_base_unet": True}, "fp8_base_unet needs mixed_precision bf16 or fp16"),
    (
        "fused_updates_do_not_clip",
        {"fused_backward_pass": True, "max_grad_norm": 1.0},
        "max_grad_norm clips by the norm of the whole gradient, which fused_backward_pass never holds",
    ),
    (
        "fused_updates_are_not_scaled",
        {"fused_optimizer_groups": 4, "mixed_precision": "fp16"},
        "fused_optimizer_groups cannot be used with mixed_precision fp16",
    ),
    (
        "fused_updates_are_per_tensor",
        {"fused_backward_pass": True, "optimizer_type": "prodigyopt.Prodigy"},
        "fused_backward_pass cannot be used with prodigyopt.Prodigy",
    ),
    ("ranks_come_from_a_file", {"dim_from_weights": True}, "needs network_weights"),
    ("strengths_belong_to_files", {"base_weights_multiplier": [0.5]}, "more values than base_weights has files"),
    (
        "norms_can_be_limited",
        {"scale_weight_norms": 1.0, "network_module": "networks.oft"},
        "has no meaning for networks.oft",
    ),
    (
        "norms_can_be_limited",
        {"scale_weight_norms": 1.0, "optimizer_type": "AdamWScheduleFree"},
        "cannot be used with AdamWScheduleFree",
    ),
    (
        "oft_is_for_the_unet",
        {"network_module": "oft", "network_train_text_encoder_only": True},
        "networks.oft adapts the U-Net only",
    ),
    (
        "lycoris_algorithms_work",
        {"network_module": "lycoris.kohya", "network_args": ["algo=DyLoRA"]},
        "dylora of LyCORIS does not read its weights back",
    ),
    (
        "lycoris_algorithms_work",
        {"network_module": "lycoris.kohya", "network_args": ["algo=tlora"]},
        "tlora of LyCORIS fails on convolutions",
    ),
    (
        "dora_reads_the_base",
        {"network_module": "networks.dora", "fp8_base": True, "mixed_precision": "bf16"},
        "networks.dora cannot be used with fp8_base",
    ),
    (
        "one_rate_for_all_modules",
        {"optimizer_type": "Prodigy", "learning_rate": 1.0, "network_args": ["loraplus_lr_ratio=4"]},
        "loraplus_lr_ratio makes several",
    ),
    (
        "one_rate_for_all_modules",
        {"optimizer_type": "Prodigy", "learning_rate": 1.0, "network_args": ["target_rules=attn1 -> lr=1.0"]},
        "target_rules makes several",
    ),
    ("only_embeddings_are_pickles", {"save_model_as": "pt"}, "only embeddings are written so"),
    ("small_files_have_no_folder", {"save_model_as": "diffusers"}, "a network is saved as a single file"),
    ("output_is_named", {"output_dir": ""}, "output_dir is missing"),
    ("samples_need_prompts", {"sample_every_n_steps": 5}, "sample_every_n_steps needs sample_prompts"),
    (
        "samples_need_prompts",
        {"sample_at_first": True, "sample_every_n_epochs": 5},
        "sample_every_n_epochs and sample_at_first need sample_prompts",
    ),
    ("samples_need_prompts", {"sample_grid": True}, "sample_grid needs sample_prompts"),
    ("validation_needs_images", {"validate_every_n_steps": 5}, "cannot act: no images are held out"),
    (
        "validation_timesteps_fit",
        {"validation_split": 0.1, "min_timestep": 10, "max_timestep": 12, "validation_timesteps": 3},
        "there are only 2 timesteps",
    ),
    ("ema_is_kept", {"ema_decay": 0.9, "save_ema": "only"}, "ema_decay and save_ema cannot act without use_ema"),
    ("ema_decays_are_in_order", {"use_ema": True, "ema_decay": 0.9, "ema_min_decay": 0.95}, "above ema_decay"),
]
FULL_CASES = [
    (
        "cached_text_encoders_stay",
        {"cache_text_encoder_outputs": True, "train_text_encoder": True},
        "exclude each other",
    ),
    ("something_has_a_rate", {"learning_rate": 0.0}, "nothing would train"),
    ("something_has_a_rate", {"block_lr": [0.0] * 23}, "nothing would train"),
    (
        "something_has_a_rate",
        {"learning_rate": 0.0, "train_text_encoder": True, "learning_rate_te1": 0.0, "learning_rate_te2": 0.0},
        "nothing would train",
    ),
]
TOKEN = {"train_tokens": True, "token_string": "zxq"}
TOKEN_CASES = [
    ("tokens_are_named", {"token_string": None}, "there is no token to train"),
    ("tokens_are_named", {"token_string": "a b"}, "the token 'a b' has ' ' in it"),
    ("tokens_are_named", {"token_string": "a/b"}, "has '/' in it"),
    ("tokens_are_named", {"weights": __file__, "init_word": "cat"}, "starts from weights and from init_word"),
    ("tokens_are_named", {"weights": "nowhere.pt"}, "weights nowhere.pt does not exist"),
    ("tokens_are_named", {"init_word": "nowhere.safetensors"}, "init_word nowhere.safetensors does not exist"),
    ("tokens_are_named", {"token_file": __file__}, "token_string cannot stand beside it"),
    ("one_template", {"use_object_template": True, "use_style_template": True}, "are several templates"),
    ("one_template", {"token_template_file": __file__}, "has no {}"),
    (
        "tokens_are_encoded_anew",
        {"cache_text_encoder_outputs": True},
        "cached captions do not learn",
    ),
    (
        "token_norms_can_be_moved",
        {"token_norm_decay": 0.1, "optimizer_type": "AdamWScheduleFree"},
        "cannot be used with AdamWScheduleFree",
    ),
    ("tokens_are_encoded_anew", {"text_encoder_batch_size": 4}, "cannot act while tokens are trained"),
    ("tokens_have_a_rate", {"learning_rate": 0.0}, "would leave the tokens as they are"),
    ("small_files_have_no_folder", {"save_model_as": "diffusers"}, "an embedding is saved as a single file"),
]
PIVOTAL_CASES = [
    ("tokens_are_asked_for", {"token_string": "zxq"}, "token_string cannot act without train_tokens"),
    ("tokens_are_asked_for", {"bundle_tokens": True, "token_lr": 0.1}, "token_lr and bundle_tokens cannot act without"),
    ("tokens_are_named", {**TOKEN, "token_string": "v1.0", "bundle_tokens": True}, "where a dot ends its name"),
    ("token_rate_fits", {**TOKEN, "token_lr": 0.0}, "token_lr 0 would leave the tokens"),
    (
        "token_rate_fits",
        {**TOKEN, "token_lr": 0.5, "optimizer_type": "Prodigy", "learning_rate": 1.0},
        "takes one learning rate",
    ),
]
MERGED = {"network_module": ["networks.lora"], "network_weights": [__file__], "network_merge": True}
OVER = {"image_path": __file__, "mask_path": __file__}
HIGHRES = {"highres_fix_scale": 0.5}
GENERATOR_CASES = [
    ("checkpoint_is_named", {"ckpt": ""}, "ckpt is missing"),
    (
        "sampler_can_draw_the_model",
        {"sampler": "unipc_karras", "prediction_type": "rectified_flow"},
        "unipc_karras cannot draw a model of rectified flow",
    ),
    (
        "sampler_can_draw_the_model",
        {"sampler": "euler_karras", "zero_terminal_snr": True},
        "euler_karras cannot draw a model with zero terminal SNR",
    ),
    (
        "sampler_can_draw_the_model",
        {"sampler": "pndm", "zero_terminal_snr": True},
        "pndm cannot draw a model with zero terminal SNR",
    ),
    ("eta_has_a_sampler", {"eta": 0.5, "sampler": "heun"}, "heun has no eta"),
    ("eta_has_a_sampler", {"eta": 0.5, "prediction_type": "rectified_flow"}, "eta cannot act on rectified flow"),
    ("prompt_is_there", {"prompt": None}, "there is no prompt"),
    ("something_is_shuffled", {"shuffle_prompts": True}, "nothing to shuffle"),
    ("there_is_a_picture_to_draw_over", {"mask_path": __file__}, "mask_path cannot act"),
    ("there_is_a_picture_to_draw_over", {"use_original_file_name": True}, "use_original_file_name cannot act"),
    ("there_is_a_picture_to_draw_over", {"strength": 0.5}, "strength cannot act"),
    *(
        ("highres_fix_is_on", {name: value}, f"{name} cannot act: there is no smaller picture")
        for name, value in (
            ("highres_fix_steps", 5),
            ("highres_fix_strength", 0.5),
            ("highres_fix_save_1st", True),
            ("highres_fix_latents_upscaling", True),
            ("highres_fix_upscaler", "a"),
            ("highres_fix_upscaler_args", "a=1"),
            ("highres_fix_disable_control_net", True),
        )
    ),
    ("highres_fix_is_on", {**HIGHRES, "highres_fix_strength": 0.5}, "drawn over nothing"),
    (
        "highres_fix_is_on",
        {**HIGHRES, "highres_fix_upscaler": "a", "highres_fix_latents_upscaling": True},
        "two ways to enlarge",
    ),
    ("highres_fix_is_on", {**HIGHRES, "highres_fix_upscaler_args": "a=1"}, "has no upscaler to act on"),
    ("highres_fix_is_on", {**HIGHRES, "highres_fix_disable_control_net": True}, "there are no control images"),
    (
        "compiled_blocks_stay_as_they_are",
        {"compile": True, "control_net_lllite_models": [__file__], "guide_image_path": [__file__]},
        "compile cannot act",
    ),
    ("colours_have_a_mask", {"network_regional_mask_max_color_codes": 3}, "no network acts in parts"),
    ("colours_have_a_mask", MERGED | OVER | {"network_regional_mask_max_color_codes": 3}, "no network acts in parts"),
    ("regional_networks_are_live", {**MERGED, **OVER, "network_merge": False, "network_pre_calc": True}, "everywhere"),
    ("there_is_a_picture_to_draw_over", MERGED | {"mask_path": __file__}, "mask_path cannot act"),
    ("there_is_a_picture_to_embed", {"clip_vision_strength": 1.0}, "there is no picture to embed"),
    ("there_is_a_picture_to_embed", {"clip_vision_model": "a/b"}, "cannot act without a strength"),
    *[
        ("programs_say_the_same_again", {"from_module": __file__, name: True}, f"{name} needs the same prompts again")
        for name in ("resume_bulk", "prompts_per_rank")
    ],
    ("sheets_have_lines_that_stay", {"grid": ["seeds"], "from_module": __file__}, "grid cannot act on from_module"),
    ("arguments_have_a_module", {"prompter_module_args": "a"}, "no program makes prompts"),
    ("one_precision", {"fp16": True, "bf16": True}, "two precisions"),
    (
        "a_grid_has_prompts",
        {"grid": ["seeds"], "image_path": __file__, "prompt": None},
        "grid cannot act on the prompts",
    ),
    ("what_is_typed_is_not_planned", {"interactive": True, "resume_bulk": True}, "resume_bulk cannot act on prompts"),
    ("what_is_typed_is_not_planned", {"interactive": True, "prompts_per_rank": True}, "prompts_per_rank cannot act on"),
    ("what_is_typed_is_not_planned", {"interactive": True, "grid": ["seeds"]}, "grid cannot act on prompts"),
    ("what_is_there_is_written_down", {"resume_bulk": True, "parameters_file": False}, "resume_bulk goes by"),
    (
        "what_is_there_is_written_down",
        {"prompts_per_rank": True, "grid": ["seeds"], "parameters_file": False},
        "the ranks of a grid go by",
    ),
    (
        "a_grid_has_an_order",
        {"grid": ["seeds"], "from_file": __file__, "shuffle_prompts": True},
        "shuffle_prompts cannot act on a grid",
    ),
    ("networks_match", {"network_module": ["networks.lora"]}, "names 1 and network_weights 0"),
    ("networks_match", {"network_mul": [0.5]}, "network_mul has more values"),
    ("one_prediction_type", {"prediction_type": "epsilon", "v_parameterization": True}, "two prediction types"),
    ("only_flow_is_shifted", {"prediction_type": "epsilon", "flow_shift": 3.0}, "not on epsilon"),
    ("networks_match", {"network_block_weights": [",".join("1" * 12)]}, "network_block_weights has more values"),
    (
        "control_images_and_networks_go_together",
        {"control_net_lllite_models": [__file__]},
        "control_net_lllite_models have no control image",
    ),
    (
        "control_images_and_networks_go_together",
        {"control_net_models": [__file__]},
        "control_net_models have no control image",
    ),
    ("control_images_and_networks_go_together", {"control_net_preps": ["canny"]}, "control_net_preps has more values"),
    (
        "lllites_see_whole_maps",
        {"control_net_lllite_models": [__file__], "guide_image_path": [__file__], "ds_depth_1": 3},
        "a LLLite does not fit the maps",
    ),
    ("control_images_and_networks_go_together", {"guide_image_path": [__file__]}, "guide_image_path cannot act"),
    ("control_images_and_networks_go_together", {"control_net_ratios": [0.5]}, "control_net_ratios has more values"),
    ("control_images_and_networks_go_together", {"control_net_multipliers": [0.5]}, "control_net_multipliers has more"),
    ("deep_shrink_can_act", {"ds_ratio": 0.4}, "ds_ratio cannot act without ds_depth_1"),
    (
        "deep_shrink_can_act",
        {"ds_depth_1": 3, "ds_depth_2": 4},
        "from ds_timesteps_1 (650) down to ds_timesteps_2 (650)",
    ),
    ("deep_shrink_can_act", {"ds_depth_1": 3, "ds_timesteps_2": 400}, "ds_timesteps_2 cannot act without ds_depth_2"),
    ("gradual_latent_can_act", {"gradual_latent_ratio": 0.4}, "cannot act without gradual_latent_timesteps"),
    (
        "gradual_latent_can_act",
        {"gradual_latent_timesteps": 650},
        "cannot act with ddim: Gradual Latent is for euler_a",
    ),
    (
        "gradual_latent_can_act",
        {"gradual_latent_s_noise": 0.4, "prompt": "a --glt 3", "sampler": "heun"},
        "gradual_latent_s_noise cannot act with heun",
    ),
    (
        "gradual_latent_can_act",
        {"gradual_latent_timesteps": 650, "sampler": "euler_a", "image_path": __file__},
        "Gradual Latent begins with noise",
    ),
    ("networks_are_merged_or_live", {"network_merge": True}, "no network to act on"),
    ("networks_are_merged_or_live", {"network_pre_calc": True}, "no network to act on"),
    ("networks_are_merged_or_live", {"network_show_meta": True}, "no network to act on"),
    ("networks_are_merged_or_live", {"network_merge_n_models": 1}, "there are 0 networks"),
    ("networks_are_merged_or_live", MERGED | {"network_merge_n_models": 1}, "merges all networks"),
    ("networks_are_merged_or_live", MERGED | {"network_pre_calc": True}, "all are merged"),
]


ADMIN_CASES = [
    ("command_is_named", {"command": None}, "there is nothing to do"),
    ("command_is_named", {"yes": True}, "yes cannot act in status"),
    ("command_is_named", {"command": "clean", "remove": True}, "remove cannot act in clean"),
    ("command_is_named", {"command": "pack", "delete_broken": True}, "delete_broken cannot act in pack"),
]


LLLITE_CASES = [
    ("conditions_are_no_masks", {"masked_loss": True}, "masked_loss cannot act"),
    ("regularisation_needs_conditions", {"reg_data_dir": "images"}, "reg_data_dir cannot act"),
    ("the_network_has_a_rate", {"learning_rate": 0.0}, "nothing would train"),
    ("small_files_have_no_folder", {"save_model_as": "diffusers"}, "saved as a single file"),
]


@pytest.fixture
def paired(tmp_path):
    """The fewest options with which sdxl_train_control_net_lllite starts."""
    for name in ("images", "edges"):
        (tmp_path / name).mkdir()
    named = {"train_data_dir": str(tmp_path / "images"), "conditioning_data_dir": str(tmp_path / "edges")}
    return {**named, "pretrained_model_name_or_path": "tiny", "resolution": 512, "output_dir": str(tmp_path / "out")}


@pytest.mark.parametrize(("rule", "changes", "what"), LLLITE_CASES)
def test_rule_of_lllite_fires(rule, changes, what, paired):
    with pytest.raises(UserError) as caught:
        make_config("sdxl_train_control_net_lllite", **{**paired, **changes})
    assert what in caught.value.problems[0].what and caught.value.problems[0].fix


def test_images_of_a_lllite_have_conditions(paired, tmp_path):
    (spec,) = dataset_specs(make_config("sdxl_train_control_net_lllite", **paired))
    (subset,) = spec.subsets
    assert (subset.image_dir, subset.control_dir) == (paired["train_data_dir"], paired["conditioning_data_dir"])
    assert subset.num_repeats == 1
    for run in ("cache_latents", "dataset_report"):  # the same file serves the tools
        known = {name: value for name, value in paired.items() if name in RUNS[run].options()}
        (shared,) = dataset_specs(make_config(run, **known, cond_emb_dim=16))[0].subsets
        assert shared == subset
    (tmp_path / "meta.json").write_text("{}")
    (spec,) = dataset_specs(make_config("sdxl_train_control_net_lllite", **paired, in_json=str(tmp_path / "meta.json")))
    assert spec.subsets[0].control_dir == paired["conditioning_data_dir"]
    for changes, what in (
        ({"conditioning_data_dir": None}, "images has no condition images, and this run learns from nothing else"),
        ({"conditioning_data_dir": "nowhere"}, "conditioning_data_dir nowhere does not exist"),
        ({"cond_emb_dim": 7}, "cond_emb_dim = 7 must be even"),
    ):
        with pytest.raises(UserError) as caught:
            make_config("sdxl_train_control_net_lllite", **{**paired, **changes})
        assert what in caught.value.problems[0].what
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='{}'\n"
    (tmp_path / "data.toml").write_text(text.format(paired["train_data_dir"]))
    with pytest.raises(UserError, match="has no condition images"):
        make_config("sdxl_train_control_net_lllite", **paired, dataset_config=str(tmp_path / "data.toml"))


@pytest.mark.parametrize(("rule", "changes", "what"), ADMIN_CASES)
def test_rule_of_the_cache_tool_fires(rule, changes, what, complete):
    named = {name: complete[name] for name in ("train_data_dir", "resolution")}
    with pytest.raises(UserError) as caught:
        make_config("cache_admin", **{**named, "command": "status", **changes})
    (problem,) = caught.value.problems
    assert what in problem.what and problem.fix


@pytest.mark.parametrize(("rule", "changes", "what"), TRAINER_CASES)
def test_trainer_rule_fires(problems_of, rule, changes, what):
    (problem,) = problems_of(**changes)
    assert what in problem.what
    assert problem.fix


@pytest.mark.parametrize(("rule", "changes", "what"), FULL_CASES)
def test_rule_of_the_full_fine_tune_fires(problems_of, rule, changes, what):
    (problem,) = problems_of(run="sdxl_train", **changes)
    assert what in problem.what and problem.fix


@pytest.mark.parametrize(("rule", "changes", "what"), TOKEN_CASES)
def test_rule_of_textual_inversion_fires(problems_of, rule, changes, what):
    (problem,) = problems_of(run="sdxl_train_textual_inversion", **{"token_string": "zxq", **changes})
    assert what in problem.what and problem.fix


@pytest.mark.parametrize(("rule", "changes", "what"), PIVOTAL_CASES)
def test_rule_of_tokens_beside_a_network_fires(problems_of, rule, changes, what):
    (problem,) = problems_of(**changes)
    assert what in problem.what and problem.fix


@pytest.mark.parametrize(("rule", "changes", "what"), GENERATOR_CASES)
def test_generator_rule_fires(rule, changes, what):
    with pytest.raises(UserError) as caught:
        make_config("sdxl_gen_img", **{"ckpt": "tiny", "prompt": "a cat", **changes})
    (problem,) = caught.value.problems
    assert what in problem.what


def test_every_rule_has_a_case():
    every = (TRAINER_CASES, FULL_CASES, TOKEN_CASES, PIVOTAL_CASES, GENERATOR_CASES, ADMIN_CASES, LLLITE_CASES)
    cases = {rule for group in every for rule, _, _ in group}
    assert {entry.check.__name__ for entry in validate.RULES} == cases


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_text_encoder_outputs": True, "network_train_unet_only": True, "caption_dropout_rate": 0.1},
        {"use_8bit_adam": True},
        {"use_8bit_adam": True, "optimizer_type": "AdamW8bit"},
        {"use_lion_optimizer": True},
        {"optimizer_type": "Adafactor", "lr_scheduler": "adafactor"},
        {"optimizer_type": "AdamWScheduleFree", "lr_warmup_steps": 10, "lr_scheduler": "cosine_with_min_lr"},
        {"optimizer_type": "Prodigy", "learning_rate": 1.0, "text_encoder_lr": [0.5], "network_train_unet_only": True},
        {"optimizer_type": "Prodigy", "unet_lr": 1.0, "text_encoder_lr": [1.0]},
        {"optimizer_type": "ProdigyPlusScheduleFree", "unet_lr": 1.0, "text_encoder_lr": [0.5]},
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": ["min_lr=1e-6"], "lr_warmup_steps": 10},
        {"lr_scheduler": "rex", "lr_scheduler_min_lr_ratio": 0.1, "lr_warmup_steps": "10%"},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0.1},
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ['step_rules="1:10,0.1"']},
        {"min_timestep": 499, "max_timestep": 500},
        {"timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 2.0, "max_timestep": 251},
        {"timestep_bias_strategy": "range", "timestep_bias_begin": 999, "timestep_bias_multiplier": 0.5},
        {"adaptive_noise_scale": 0, "min_snr_gamma": 0, "soft_min_snr_gamma": 0, "p2_gamma": 1},
        {"adaptive_noise_scale": -0.1, "noise_offset": 0.1, "snr_gamma": 5, "input_perturbation": 0.1},
        {"sample_every_n_steps": 0},
        {"validation_split": 0.1, "validate_every_n_steps": 5, "max_validation_steps": 2},
        {"min_timestep": 10, "max_timestep": 12},
        {"use_ema": True, "ema_update_interval": 10, "ema_device": "cpu", "save_ema": "last"},
        {"random_crop": True},
        {"full_bf16": True, "mixed_precision": "bf16", "stochastic_rounding": False},
        {"full_fp16": True, "mixed_precision": "fp16"},
        {"fp8_base": True, "mixed_precision": "fp16"},
        {"fused_backward_pass": True, "max_grad_norm": 0.0, "mixed_precision": "bf16"},
        {"fused_optimizer_groups": 0, "max_grad_norm": 1.0},
        {"cache_latents": True, "flip_aug": True},
        {"scale_weight_norms": 0, "network_module": "networks.oft"},
        {"network_module": "lycoris.kohya", "network_args": ["algo=tlora", "preset=attn-mlp"]},
        {"scale_weight_norms": 1.0, "network_module": "networks.dora"},
        {"network_module": "networks.oft", "fp8_base": True, "mixed_precision": "bf16"},
        {"optimizer_type": "Prodigy", "learning_rate": 1.0, "network_args": ["target_rules=attn1 -> dim=8"]},
    ],
)
def test_legal_combinations_pass(problems_of, changes):
    assert problems_of(**changes) == ()


def test_settings_that_follow_from_others(complete):
    cfg = make_config(
        "sdxl_train_network",
        **complete,
        cache_latents_to_disk=True,
        cache_text_encoder_outputs_to_disk=True,
        network_train_unet_only=True,
        use_8bit_adam=True,
        mem_eff_attn=True,
    )
    assert cfg.data.cache_latents and cfg.data.cache_text_encoder_outputs and cfg.model.sdpa
    assert cfg.optim.optimizer_type == "AdamW8bit"
    assert cfg.provenance["cache_latents"] == "implied by cache_latents_to_disk"
    assert [notice.split()[0] for notice in cfg.notices] == [
        "cache_latents", "cache_text_encoder_outputs", "mem_eff_attn:",
    ]  # fmt: skip


@pytest.mark.parametrize("changes", [{"fused_backward_pass": True}, {"fused_optimizer_groups": 3}])
def test_a_fused_update_does_not_clip_and_says_so(complete, changes):
    cfg = make_config("sdxl_train_network", **complete, **changes)
    assert cfg.optim.max_grad_norm == 0
    assert cfg.provenance["max_grad_norm"] == f"implied by {next(iter(changes))}"
    assert cfg.notices[0].startswith("max_grad_norm is 0 (no clipping)")


def test_workers_are_limited_by_the_cores(complete, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert make_config("sdxl_train_network", **complete).data.max_data_loader_n_workers == 3
    cfg = make_config("sdxl_train_network", **complete, max_data_loader_n_workers=5)
    assert cfg.data.max_data_loader_n_workers == 3
    assert "instead of 5" in cfg.notices[0]
    assert (
        make_config("sdxl_train_network", **complete, max_data_loader_n_workers=2).data.max_data_loader_n_workers == 2
    )


def test_sampling_by_epochs_takes_the_place_of_steps(complete, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    settings = {"sample_prompts": str(prompts), "sample_every_n_epochs": 1, "sample_every_n_steps": 5}
    cfg = make_config("sdxl_train_network", **complete, **settings)
    assert cfg.preview.sample_every_n_steps is None
    assert "sample_every_n_steps is ignored" in cfg.notices[0]


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"clip_skip": 2}, "clip_skip is only recorded"),
        ({"use_ema": True, "ema_power": 0.75}, "ema_power has no effect"),
        ({"use_ema": True, "optimizer_type": "AdamWScheduleFree"}, "use_ema averages the points"),
        ({"use_ema": True, "save_ema": "none"}, "use_ema has no effect on any file"),
        ({"max_train_steps": 10, "max_train_epochs": 1}, "max_train_steps is ignored"),
        ({"lr_scheduler_num_cycles": 3}, "lr_scheduler_num_cycles has no effect"),
        ({"lr_scheduler_power": 2.0, "lr_scheduler": "cosine"}, "lr_scheduler_power has no effect"),
        ({"lr_scheduler_timescale": 7}, "lr_scheduler_timescale has no effect"),
        ({"lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler": "cosine"}, "lr_scheduler_min_lr_ratio has no effect"),
        ({"lr_decay_steps": 5, "lr_scheduler_type": "StepLR"}, "lr_decay_steps has no effect"),
        ({"lr_scheduler": "cosine", "lr_scheduler_type": "LinearLR"}, "lr_scheduler is ignored"),
        ({"lr_scheduler": "warmup_stable_decay"}, "lr_scheduler warmup_stable_decay never decays"),
        ({"optimizer_type": "Adafactor", "lr_scheduler": "cosine"}, "lr_scheduler has no effect: Adafactor"),
        ({"optimizer_type": "Adafactor", "lr_decay_steps": 5}, "lr_decay_steps has no effect: Adafactor"),
        ({"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "cosine"}, "lr_scheduler has no effect: AdamW"),
        ({"optimizer_type": "SGDScheduleFree", "lr_warmup_steps": 5}, "lr_warmup_steps has no effect: SGD"),
        ({"optimizer_type": "pytorch_optimizer.ScheduleFreeAdamW", "lr_scheduler": "linear"}, "lr_scheduler has no"),
        ({"optimizer_type": "Prodigy", "learning_rate": 1e-4}, "learning rate 0.0001 is low for Prodigy"),
        ({"optimizer_type": "DAdaptation", "learning_rate": 0.1}, "learning rate 0.1 is low for DAdaptation"),
        (
            {"optimizer_type": "Prodigy", "lr_scheduler": "cosine", "lr_warmup_steps": 5},
            "Prodigy may overestimate its step size",
        ),
        (
            {"optimizer_type": "Prodigy", "lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2},
            "restarts are known to fail with Prodigy",
        ),
        ({"optimizer_type": "SGDNesterov8bit"}, "SGDNesterov8bit makes steps of plain momentum"),
        ({"huber_c": 0.2}, "huber_c has no effect: it acts with loss_type huber or smooth_l1"),
        ({"noise_offset_random_strength": True}, "noise_offset_random_strength has no effect"),
        ({"multires_noise_discount": 0.5}, "multires_noise_discount has no effect"),
        ({"ip_noise_gamma_random_strength": True}, "ip_noise_gamma_random_strength has no effect"),
        ({"logit_mean": 0.5}, "logit_mean has no effect"),
        ({"timestep_bias_multiplier": 2.0}, "timestep_bias_multiplier has no effect"),
        ({"timestep_bias_strategy": "later"}, "timestep_bias_strategy has no effect: timestep_bias_multiplier is 1"),
        ({"timestep_bias_strategy": "later", "timestep_bias_end": 9}, "timestep_bias_end has no effect"),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_begin": 9, "timestep_bias_portion": 0.5},
            "timestep_bias_portion has no effect",
        ),
        ({"p2_k": 2.0}, "p2_k has no effect"),
        ({"dream_detail_preservation": 2.0}, "dream_detail_preservation has no effect"),
        ({"network_train_unet_only": True, "text_encoder_lr": [1e-4]}, "text_encoder_lr has no effect"),
        ({"network_train_text_encoder_only": True, "unet_lr": 1e-4}, "unet_lr has no effect"),
        ({"save_n_epoch_ratio": 2, "save_every_n_epochs": 1}, "save_every_n_epochs is ignored"),
        ({"save_last_n_steps": 2}, "save_last_n_steps has no effect"),
        ({"save_last_n_epochs_state": 2}, "save_last_n_epochs_state has no effect"),
        ({"metadata_thumbnail": "no_such.png"}, "metadata_thumbnail is left out"),
        ({"dataset_repeats": 3}, "dataset_repeats has no effect"),
        ({"token_warmup_min": 3}, "token_warmup_min has no effect"),
        ({"sdpa": True, "xformers": True}, "sdpa and xformers"),
        ({"persistent_data_loader_workers": True, "max_data_loader_n_workers": 0}, "persistent_data_loader_workers"),
        ({"stochastic_rounding": False}, "stochastic_rounding has no effect"),
        ({"fp8_base": True, "fp8_base_unet": True, "mixed_precision": "bf16"}, "fp8_base acts on the U-Net only"),
        ({"fused_backward_pass": True, "fused_optimizer_groups": 2}, "fused_optimizer_groups is ignored"),
        ({"tokenizer_cache_dir": "x"}, "tokenizer_cache_dir has no effect"),
        (
            {"cache_text_encoder_outputs": True, "network_train_unet_only": True, "text_cache_variants": 2},
            "text_cache_variants has no effect",
        ),
    ],
)
def test_settings_that_do_nothing_are_told(complete, changes, start):
    notices = make_config("sdxl_train_network", **complete, **changes).notices
    assert any(notice.startswith(start) for notice in notices)


def test_the_older_name_of_lion_is_lion(complete):
    assert make_config("sdxl_train_network", **complete, use_lion_optimizer=True).optim.optimizer_type == "Lion"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer_type": "Adafactor", "lr_scheduler": "adafactor"},
        {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "constant", "optimizer_args": ["warmup_steps=9"]},
        {"optimizer_type": "Prodigy", "learning_rate": 1.0, "lr_scheduler": "cosine"},
        {
            "optimizer_type": "Prodigy",
            "learning_rate": 1.0,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 5,
            "optimizer_args": ["safeguard_warmup=True"],
        },
        {"optimizer_type": "ProdigyPlusScheduleFree", "unet_lr": 1.0, "network_train_unet_only": True},
        {
            "optimizer_type": "ProdigyPlusScheduleFree",
            "learning_rate": 1.0,
            "optimizer_args": ["use_schedulefree=False"],
            "lr_scheduler": "cosine",
        },
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3, "lr_warmup_steps": 5},
        {
            "lr_scheduler": "warmup_stable_decay",
            "lr_decay_steps": "20%",
            "lr_scheduler_min_lr_ratio": 0.1,
            "lr_scheduler_num_cycles": 2,
        },
        {"lr_scheduler_type": "torch.optim.lr_scheduler.StepLR", "lr_scheduler_args": ["step_size=5"]},
    ],
)
def test_rates_and_schedules_that_fit_need_no_notice(complete, changes):
    assert make_config("sdxl_train_network", **complete, **changes).notices == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pretrained_model_name_or_path": "models/base.safetensors"}, "does not exist"),
        ({"pretrained_model_name_or_path": "/no/such/folder"}, "does not exist"),
        ({"pretrained_model_name_or_path": "sdxl"}, "does not exist"),
        ({"vae": "vae.safetensors"}, "vae vae.safetensors does not exist"),
        ({"train_data_dir": "nowhere"}, "train_data_dir nowhere does not exist"),
        ({"dataset_config": "nowhere.toml"}, "dataset_config nowhere.toml does not exist"),
        ({"network_weights": "nowhere.safetensors"}, "network_weights nowhere.safetensors does not exist"),
        ({"resume": "nowhere"}, "resume nowhere does not exist"),
        ({"sample_prompts": "nowhere.txt"}, "sample_prompts nowhere.txt does not exist"),
        ({"sample_prompts": "prompts.md"}, "sample_prompts prompts.md is of no known kind"),
        ({"network_module": "networks.laro"}, "network_module networks.laro does not exist"),
        ({"network_module": "networks.control_net_lllite"}, "networks.control_net_lllite changes no weights"),
        ({"base_weights": ["nowhere.safetensors"]}, "base_weights nowhere.safetensors does not exist"),
        ({"network_module": "no_such_package.kohya"}, "cannot be found"),
    ],
)
def test_missing_files_are_found_before_anything_is_loaded(problems_of, changes, what):
    (problem,) = problems_of(**changes)
    assert what in problem.what
    assert problem.where == "argument"


def test_hub_ids_and_existing_paths_pass(problems_of, tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert problems_of(pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0") == ()
    assert problems_of(pretrained_model_name_or_path=str(tmp_path / "model.safetensors")) == ()
    assert problems_of(vae=str(tmp_path)) == ()
    assert problems_of(network_module="lora") == ()


def test_a_folder_beside_us_is_no_owner_on_the_hub(problems_of, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    (problem,) = problems_of(pretrained_model_name_or_path="models/sdxl")
    assert problem.what == "pretrained_model_name_or_path models/sdxl does not exist"


def test_misspelt_path_gets_a_suggestion(problems_of, tmp_path):
    (tmp_path / "model.safetensors").touch()
    (problem,) = problems_of(pretrained_model_name_or_path=str(tmp_path / "modell.safetensors"))
    assert problem.fix == f"did you mean {tmp_path / 'model.safetensors'}?"
    (problem,) = problems_of(pretrained_model_name_or_path=str(tmp_path / "no" / "model.safetensors"))
    assert problem.fix == f"there is no folder {tmp_path / 'no'}"


def test_pattern_names_one_checkpoint(tmp_path):
    (tmp_path / "epoch-1.safetensors").touch()
    argv = ["--ckpt", str(tmp_path / "epoch-*.safetensors"), "--prompt", "a cat --w 128 --n dog"]
    cfg = parse("sdxl_gen_img", argv)
    assert cfg.generate.ckpt == str(tmp_path / "epoch-1.safetensors")
    assert cfg.generate.prompt == "a cat --w 128 --n dog"
    (tmp_path / "epoch-2.safetensors").touch()
    with pytest.raises(UserError, match="does not exist"):
        parse("sdxl_gen_img", argv)


def test_generator_reads_networks(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").touch()
    weights = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    cfg = parse(
        "sdxl_gen_img",
        ["--ckpt", "tiny", "--prompt", "", "--network_module", "networks.lora", "networks.lora",
         "--network_weights", *weights, "--network_mul", "-0.5", "1", "--network_args", "a=1;b=2"],
    )  # fmt: skip
    assert cfg.generate.network_mul == (-0.5, 1.0)
    assert cfg.generate.network_kwargs(0) == {"a": "1", "b": "2"}
    assert cfg.generate.network_kwargs(1) == {}
    assert cfg.generate.prompt is None


def test_scales_of_guidance_that_act_on_no_prompt_are_announced():
    options = {"negative_scale": 3.0, "guidance_rescale": 0.5, "original_width_negative": 9,
               "original_height_negative": 9}  # fmt: skip
    base = {"ckpt": "tiny", "prompt": "a cat", **options}
    assert [n.split()[0] for n in make_config("sdxl_gen_img", **base, scale=1.0).notices] == list(options)
    assert make_config("sdxl_gen_img", **base).notices == []


def test_a_mask_of_networks_leaves_nothing_of_the_picture_that_is_drawn_over():
    base = {"ckpt": "tiny", "prompt": "a cat", **OVER}
    assert make_config("sdxl_gen_img", **base).notices == []
    (notice,) = make_config("sdxl_gen_img", **base, **{**MERGED, "network_merge": False}).notices
    assert "the whole of image_path is drawn anew" in notice
    assert make_config("sdxl_gen_img", **base, **MERGED).notices == []


@pytest.mark.parametrize(
    "changes",
    [
        {"ds_depth_1": 0, "ds_ratio": 0.4},
        {"ds_ratio": 0.4, "prompt": "a --DSD1 3"},
        {"ds_ratio": 0.4, "ds_depth_2": 4, "from_file": __file__},
        {"ds_depth_1": 3, "ds_depth_2": 4, "ds_timesteps_2": 300},
        {"ds_depth_1": 3, "ds_depth_2": 4, "prompt": "a --dst2 300"},
        {"gradual_latent_timesteps": 500, "sampler": "k_euler_a", "gradual_latent_unsharp_params": "3,0.5,0.5"},
        {"gradual_latent_ratio": 0.4, "prompt": "a --gle 3", "sampler": "euler_a_karras"},
        {"gradual_latent_s_noise": 0.4, "interactive": True, "sampler": "euler_a"},
        {"ds_ratio": 0.4, "from_module": __file__},
        {"gradual_latent_s_noise": 0.4, "from_module": __file__, "sampler": "euler_a"},
    ],
)
def test_effects_that_prompts_may_ask_for_are_no_mistake(changes):
    make_config("sdxl_gen_img", **{"ckpt": "tiny", "prompt": "a cat", **changes})


def test_unsharp_parameters_are_read_at_once():
    with pytest.raises(UserError, match="must begin with an odd number of cells"):
        make_config("sdxl_gen_img", ckpt="tiny", prompt="a", gradual_latent_unsharp_params="2,1,1")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("none", None),
        ("canny", Prep("canny", Settings(low=63, high=191))),
        ("Canny_30", Prep("canny", Settings(low=30, high=191))),
        ("canny_30_90", Prep("canny", Settings(low=30, high=90))),
        ("palette", Prep("palette", Settings())),
    ],
)
def test_preparations_of_control_images(text, wanted):
    assert parse_prep(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "cannyx", "canny_", "canny_a", "canny_1_2_3", "canny_-1", "soft_1", "none_1", "depth"]
)
def test_unknown_preparations_are_refused_with_the_known_ones(text):
    with pytest.raises(ValueError, match=r"there are none, canny, canny_<low>_<high>, soft|no whole number, as in"):
        parse_prep(text)
    with pytest.raises(UserError):
        make_config("sdxl_gen_img", ckpt="tiny", prompt="a", control_net_preps=[text])

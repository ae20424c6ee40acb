"""Example TOML files: chosen values, rendered with the help texts of the options they set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """An example file of one run. `notes`: option -> what to say about the chosen value instead of the help text."""

    run: str
    intro: tuple[str, ...]
    values: dict[str, Any]
    notes: dict[str, str]


RECIPES: dict[str, Recipe] = {
    "lora": Recipe(
        run="sdxl_train_network",
        intro=(
            "A LoRA for SDXL on a GPU.",
            "First the caches, which several processes can share, then the training:",
            "  accelerate launch tools/cache_latents.py --config_file docs/recipes/lora.toml",
            "  accelerate launch tools/cache_text_encoder_outputs.py --config_file docs/recipes/lora.toml",
            "  accelerate launch sdxl_train_network.py --config_file docs/recipes/lora.toml",
            "The trainer fills missing caches itself, so the first two lines may be left out.",
        ),
        values={
            "pretrained_model_name_or_path": "models/sd_xl_base_1.0.safetensors",
            "train_data_dir": "data/train",
            "resolution": "1024,1024",
            "enable_bucket": True,
            "max_bucket_reso": 2048,
            "caption_extension": ".txt",
            "caption_dropout_rate": 0.05,
            "train_batch_size": 2,
            "cache_latents": True,
            "cache_latents_to_disk": True,
            "cache_text_encoder_outputs": True,
            "cache_text_encoder_outputs_to_disk": True,
            "optimizer_type": "AdamW8bit",
            "optimizer_args": ["weight_decay=0.01"],
            "learning_rate": 1e-4,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 0.05,
            "network_module": "networks.lora",
            "network_dim": 16,
            "network_alpha": 8.0,
            "network_train_unet_only": True,
            "max_train_epochs": 10,
            "gradient_checkpointing": True,
            "mixed_precision": "bf16",
            "seed": 42,
            "output_dir": "outputs/lora",
            "output_name": "my_lora",
            "save_precision": "bf16",
            "save_every_n_epochs": 1,
            "save_state_on_train_end": True,
        },
        notes={
            "pretrained_model_name_or_path": "a single-file checkpoint, a diffusers folder or a hub id",
            "train_data_dir": "holds folders named like 10_cat: 10 repeats, class words `cat`",
            "enable_bucket": "keep the shape of each image",
            "max_bucket_reso": "room for long shapes",
            "network_train_unet_only": "cached captions cannot train the text encoders",
            "lr_warmup_steps": "5 % of all steps",
            "save_state_on_train_end": "the folder that --resume goes on from",
        },
    ),
    "full": Recipe(
        run="sdxl_train",
        intro=(
            "A full fine-tune of SDXL on a GPU.",
            "  accelerate launch sdxl_train.py --config_file docs/recipes/full.toml",
        ),
        values={
            "pretrained_model_name_or_path": "models/sd_xl_base_1.0.safetensors",
            "train_data_dir": "data/train",
            "resolution": "1024,1024",
            "enable_bucket": True,
            "max_bucket_reso": 2048,
            "caption_extension": ".txt",
            "caption_dropout_rate": 0.1,
            "train_batch_size": 4,
            "cache_latents": True,
            "cache_latents_to_disk": True,
            "cache_text_encoder_outputs": True,
            "cache_text_encoder_outputs_to_disk": True,
            "optimizer_type": "Adafactor",
            "optimizer_args": ["relative_step=False", "scale_parameter=False", "warmup_init=False"],
            "learning_rate": 1e-5,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": 100,
            "max_train_epochs": 10,
            "gradient_checkpointing": True,
            "mixed_precision": "bf16",
            "seed": 42,
            "output_dir": "outputs/full",
            "output_name": "my_model",
            "save_precision": "bf16",
            "save_every_n_epochs": 1,
            "save_state_on_train_end": True,
        },
        notes={
            "pretrained_model_name_or_path": "a single-file checkpoint, a diffusers folder or a hub id",
            "optimizer_args": "a rate of our own instead of Adafactor's",
            "train_data_dir": "holds folders named like 10_cat: 10 repeats, class words `cat`",
            "enable_bucket": "keep the shape of each image",
            "max_bucket_reso": "room for long shapes",
            "save_state_on_train_end": "the folder that --resume goes on from",
        },
    ),
    "lora_tiny": Recipe(
        run="sdxl_train_network",
        intro=(
            "A LoRA for the embedded tiny SDXL on the demo's pictures: a full run in a minute or two, without a GPU.",
            "  accelerate launch sdxl_train_network.py --config_file docs/recipes/lora_tiny.toml",
        ),
        values={
            "pretrained_model_name_or_path": "tiny",
            "train_data_dir": "demo/dataset",
            "resolution": "128,128",
            "caption_extension": ".txt",
            "train_batch_size": 4,
            "cache_latents": True,
            "cache_text_encoder_outputs": True,
            "max_data_loader_n_workers": 0,
            "learning_rate": 2e-3,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": 20,
            "network_module": "networks.lora",
            "network_dim": 8,
            "network_alpha": 8.0,
            "network_args": ["conv_dim=8", "conv_alpha=8"],
            "network_train_unet_only": True,
            "max_train_steps": 200,
            "seed": 42,
            "output_dir": "outputs/lora_tiny",
            "output_name": "lora_tiny",
        },
        notes={
            "pretrained_model_name_or_path": "the small SDXL that comes with the suite",
            "learning_rate": "far too high for the full model, where people begin at 1e-4",
            "network_train_unet_only": "cached captions cannot train the text encoders",
            "max_data_loader_n_workers": "16 small pictures need no loading processes",
        },
    ),
}

"""Options of picture generation."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from library.config.block_weights import parse_block_weights
from library.config.choices import PREDICTION_TYPES, SAMPLERS
from library.config.console import ConsoleOptions
from library.config.fields import GENERATOR, option
from library.config.key_values import split_pairs


class GenerateOptions(ConsoleOptions):
    """What is drawn, with which model, how."""

    title: ClassVar[str] = "generation"
    acts: ClassVar[frozenset[str]] = GENERATOR

    ckpt: str | None = option(
        None,
        "model: a checkpoint file (or a pattern that fits just one), a diffusers folder, a hub id, or `tiny`",
        path=True,
    )
    vae: str | None = option(None, "VAE to use instead of the checkpoint's own: file or diffusers folder", path=True)
    prediction_type: str | None = option(
        None, "what the model predicts (unset: what the checkpoint says, else epsilon)", choices=PREDICTION_TYPES
    )
    v_parameterization: bool = option(
        False, "the model predicts v, not noise: the same as prediction_type v_prediction"
    )
    zero_terminal_snr: bool = option(
        False, "the model was trained with zero terminal SNR (on where the checkpoint says so)"
    )
    flow_shift: float | None = option(
        None,
        "shift of rectified flow's timesteps, more steps at high noise above 1 (unset: the checkpoint's own, else 1)",
        gt=0,
    )
    prompt: str | None = option(None, "prompt; options such as --w 1024 --n blurry may follow inside the text")
    from_file: str | None = option(None, "prompt file, one prompt per line, # starts a comment", path=True)
    interactive: bool = option(False, "ask for prompts, after those that are given, until the input ends")
    wildcard_dir: str | None = option(
        None, "folder of text files: __name__ in a prompt becomes a line of name.txt", path=True
    )
    shuffle_prompts: bool = option(False, "go through the prompt file in another order each time (n_iter)")
    outdir: str = option("outputs", "folder for the pictures", path=True)
    W: int | None = option(None, "width in pixels (unset: 1024, or the size that the model was made for)", ge=8)
    H: int | None = option(None, "height in pixels (unset: 1024, or the size that the model was made for)", ge=8)
    steps: int = option(50, "sampling steps", ge=1, le=1000)
    scale: float = option(7.5, "strength of guidance by the prompt; 1 and below: none")
    negative_scale: float | None = option(
        None,
        "strength of guidance away from the negative prompt, measured from no prompt at all; costs half as much time "
        "again (unset: the negative prompt takes the place of no prompt, which is the same as scale - 1)",
    )
    guidance_rescale: float = option(
        0.0,
        "how far guidance is kept from raising contrast, 0 to 1; 0.7 is usual for models with zero terminal SNR",
        ge=0,
        le=1,
    )
    seed: int | None = option(
        None, "seed; with several pictures it seeds the list of their seeds (unset: random)", ge=0, lt=2**63
    )
    iter_same_seed: bool = option(
        False, "the prompts that are gone through share their seeds, which differ from time to time (n_iter)"
    )
    sampler: str = option("ddim", "sampler; a suffix says how its noise levels are spread", choices=SAMPLERS)
    eta: float | None = option(
        None,
        "share of the noise that a sampler adds while it draws (unset: 0 for ddim, 1 for euler_a and dpmpp_sde)",
        ge=0,
        le=1,
    )
    n_iter: int = option(1, "how often the whole list of prompts is gone through", ge=1)
    images_per_prompt: int = option(1, "pictures per prompt", ge=1)
    batch_size: int = option(1, "pictures that are drawn at once", ge=1)
    vae_batch_size: int | float | None = option(
        None, "pictures that the VAE decodes at once; below 1 a share of batch_size (unset: batch_size)"
    )
    sequential_file_name: bool = option(False, "name pictures im_000001.png and so on")
    fp16: bool = option(False, "compute in fp16")
    bf16: bool = option(False, "compute in bf16")
    no_half_vae: bool = option(False, "run the VAE in float32")
    max_embeddings_multiples: int | None = option(
        None, "longest prompt in chunks of 75 tokens (unset: 1)", ge=1, zero_is_unset=True
    )
    textual_inversion_embeddings: tuple[str, ...] = option(
        (), "embedding files; the name of a file, without its ending, is the word that stands for it", path=True
    )
    network_module: tuple[str, ...] = option((), "kinds of the networks, one per weights file, such as networks.lora")
    network_weights: tuple[str, ...] = option((), "network files", path=True)
    network_mul: tuple[float, ...] = option((), "strengths of the networks (unset: 1.0 each)")
    network_args: tuple[str, ...] = option((), "arguments, one text per network: key=value;key=value")
    network_block_weights: tuple[str, ...] = option(
        (),
        "weights of the model's blocks, one text per network: 26, 20 or 12 numbers (BASE,IN00-IN11,MID,OUT00-OUT11 or "
        "a part of it) or 23 (the U-Net's blocks); an empty text leaves a network as it is",
    )
    network_merge: bool = option(False, "merge all networks into the model instead of applying them")
    network_merge_n_models: int | None = option(
        None, "merge the first N networks into the model and apply the others", ge=0
    )
    network_pre_calc: bool = option(
        False, "add the networks to the model's weights before a batch, instead of computing them in every step"
    )
    network_show_meta: bool = option(False, "print the metadata of the network files")
    control_net_lllite_models: tuple[str, ...] = option(
        (), "ControlNet-LLLite files, which make pictures follow control images", path=True
    )
    control_net_multipliers: tuple[float, ...] = option(
        (), "strengths of the LLLites and then of the ControlNets (unset: 1.0 each)"
    )
    control_net_ratios: tuple[float, ...] = option(
        (), "the share of the steps, from the first on, in which each of them acts (unset: 1.0 each)"
    )
    guide_image_path: tuple[str, ...] = option(
        (),
        "control images, files or folders, for one picture after the other and then from the first again; with several "
        "networks each picture takes one for each, those of control_net_lllite_models first",
        path=True,
    )
    sdpa: bool = option(False, "PyTorch's scaled-dot-product attention, which is also the default")
    xformers: bool = option(False, "attention of the xformers library; needs CUDA")

    @field_validator("vae_batch_size")
    @classmethod
    def _above_zero(cls, value: int | float | None) -> int | float | None:
        if value is not None and value <= 0:
            raise ValueError("must be greater than 0")
        return value

    @field_validator("control_net_ratios")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= ratio <= 1 for ratio in value):
            raise ValueError("must lie between 0 and 1: a share of the steps")
        return value

    @field_validator("W", "H")
    @classmethod
    def _whole_latent_cells(cls, value: int | None) -> int | None:
        if value is not None and value % 8:
            raise ValueError(f"must be a multiple of 8, such as {value // 8 * 8}")
        return value

    @field_validator("network_args")
    @classmethod
    def _readable_pairs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            split_pairs(part for part in text.split(";") if part.strip())
        return value

    @field_validator("network_block_weights")
    @classmethod
    def _readable_weights(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_block_weights(text)
        return value

    def network_kwargs(self, index: int) -> dict[str, str]:
        """The arguments of network number `index`; {} when none were given."""
        if index >= len(self.network_args):
            return {}
        return split_pairs(part for part in self.network_args[index].split(";") if part.strip())

"""Tell what a file that is not an SDXL checkpoint is, so that the user learns what to do with it."""

from collections.abc import Callable, Iterable

from library.errors import UserError
from library.models.arch import PART_NAMES, PREFIXES, Part, SdxlArch

_MISSING_FIX = {
    "unet": "give a complete SDXL checkpoint",
    "text_encoder_1": "give a complete SDXL checkpoint; files with the U-Net alone are not enough",
    "text_encoder_2": "give a complete SDXL checkpoint; files with the U-Net alone are not enough",
    "vae": "give --vae with an SDXL VAE file or folder",
}
_LATENT_CHANNELS = 4


def _starts(*prefixes: str) -> Callable[[str], bool]:
    return lambda key: key.startswith(prefixes)


def _holds(*pieces: str) -> Callable[[str], bool]:
    return lambda key: any(piece in key for piece in pieces)


# (what a key must look like, what the file is, what to do); the first that fits any key wins
_OTHERS: tuple[tuple[Callable[[str], bool], str, str], ...] = (
    (_starts("lllite_"), "a ControlNet-LLLite model", "give the checkpoint it was trained on"),
    (
        _holds(
            "lora_down.", "lora_up.", "lora_A.", "lora_B.", ".lora.", "hada_w1", "lokr_w1", "oft_blocks", "dora_scale"
        ),
        "a LoRA or another adapter, not a checkpoint",
        "give the checkpoint it was trained on; the adapter itself goes to --network_weights",
    ),
    (_starts("control_model.", "controlnet_cond_embedding."), "a ControlNet", "give an SDXL checkpoint"),
    (
        _starts("conditioner.embedders.0.model."),
        "the SDXL refiner",
        "give the SDXL base model or a model derived from it",
    ),
    (_starts("cond_stage_model.transformer."), "a Stable Diffusion 1.x checkpoint", "give an SDXL checkpoint"),
    (_starts("cond_stage_model.model."), "a Stable Diffusion 2.x checkpoint", "give an SDXL checkpoint"),
    (_holds("joint_blocks."), "a Stable Diffusion 3 checkpoint", "give an SDXL checkpoint"),
    (_holds("double_blocks.", "single_transformer_blocks."), "a Flux checkpoint", "give an SDXL checkpoint"),
)


def refuse_other_models(keys: Iterable[str], *, where: str) -> None:
    """UserError when single-file `keys` belong to a kind of file that is known not to be an SDXL checkpoint."""
    keys = list(keys)
    for fits, what, fix in _OTHERS:
        if any(fits(key) for key in keys):
            raise UserError(f"this file is {what}", where=where, fix=fix)
    if set(keys) <= {"clip_l", "clip_g", "emb_params"}:
        raise UserError("this file is a textual inversion embedding", where=where, fix="give an SDXL checkpoint")
    if any(key.startswith(tuple(PREFIXES.values())) for key in keys):
        if all(key.startswith(PREFIXES["vae"]) for key in keys):
            raise UserError("this file holds a VAE only", where=where, fix="give it to --vae, and a checkpoint here")
        return
    if any(key.startswith(("decoder.", "encoder.down")) for key in keys):
        raise UserError("this file holds a VAE only", where=where, fix="give it to --vae, and a checkpoint here")
    if any(key.startswith(("down_blocks.", "text_model.", "encoder.layers.")) for key in keys):
        raise UserError(
            "this file is one part of a diffusers folder",
            where=where,
            fix="give the folder that holds model_index.json",
        )
    raise UserError(
        "this file is not an SDXL checkpoint: it has none of the tensors that one has",
        where=where,
        fix="give an SDXL single file, a diffusers folder, a hub id, or the name tiny",
    )


def require_parts(arch: SdxlArch, parts: Iterable[Part], *, where: str) -> None:
    """UserError when a part that is asked for is not there, or the U-Net is not a text-to-image one."""
    for part in parts:
        if getattr(arch, part) is None:
            raise UserError(f"no {PART_NAMES[part]} inside", where=where, fix=_MISSING_FIX[part])
    if arch.unet is None:
        return
    if arch.unet.in_channels != _LATENT_CHANNELS:
        kind = {9: "an inpainting model", 8: "an image-editing model"}.get(
            arch.unet.in_channels, "another kind of model"
        )
        raise UserError(
            f"this is {kind}: its U-Net takes {arch.unet.in_channels} channels, SDXL's takes {_LATENT_CHANNELS}",
            where=where,
            fix="give a text-to-image SDXL checkpoint",
        )
    if arch.vae is not None and arch.vae.latent_channels != arch.unet.in_channels:
        raise UserError(
            f"the VAE makes latents of {arch.vae.latent_channels} channels, the U-Net takes {arch.unet.in_channels}",
            where=where,
            fix="give an SDXL VAE",
        )

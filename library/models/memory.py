"""Saving memory: freezing, gradient checkpointing, VAE work in smaller pieces."""

from library.models.arch import PARTS
from library.models.bundle import ModelBundle
from library.models.vae import configure_vae

__all__ = ["configure_vae", "enable_gradient_checkpointing", "freeze"]


def freeze(bundle: ModelBundle) -> None:
    """Take every part out of training: no gradients, evaluation mode."""
    for part in PARTS:
        module = getattr(bundle, part)
        if module is not None:
            module.requires_grad_(False).eval()


def enable_gradient_checkpointing(bundle: ModelBundle, *, text_encoders: bool) -> None:
    """Recompute activations in the backward pass of the U-Net and, when asked, of both text encoders.

    The text encoders do so in training mode only. Gradients are identical to those without. The non-reentrant form
    is used, which works when only adapters inside a block need gradients and under DDP.
    """
    if bundle.unet is not None:
        bundle.unet.enable_gradient_checkpointing()
    if text_encoders:
        for encoder in (bundle.text_encoder_1, bundle.text_encoder_2):
            encoder.activation_checkpointing_enable({"use_reentrant": False})
            # transformers marks the embeddings' output as needing gradients, which only the re-entrant form wants.
            encoder.disable_input_require_grads()

"""What a model family offers to the rest of the suite; each file in `families/` is a module of this shape."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.diffusion.conditioning import TextCond, Tokens
from library.models.bundle import ModelBundle
from library.models.tokenizers import ClipTokenizer


class ModelFamily(Protocol):
    """Loading, saving, text conditions, predictions and latents of one kind of model."""

    def load(self, name_or_path: str, **options: Any) -> ModelBundle:
        """Load a model from any place a user may name."""

    def save(
        self,
        bundle: ModelBundle,
        path: str | Path,
        *,
        save_as: str,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str] | None,
    ) -> None:
        """Write a model."""

    def tokenize(
        self, tokenizer: ClipTokenizer, captions: Sequence[str], *, max_token_length: int, weighted: bool
    ) -> Tokens:
        """Captions to token ids and weights."""

    def encode_text(self, text_encoder_1: nn.Module, text_encoder_2: nn.Module, tokens: Tokens) -> TextCond:
        """Tokens to the text condition that training uses."""

    def encode_text_gen(
        self,
        text_encoder_1: nn.Module,
        text_encoder_2: nn.Module,
        tokenizer: ClipTokenizer,
        prompts: Sequence[str],
        *,
        max_chunks: int,
        balance: str,
    ) -> TextCond:
        """Prompts to the text condition that generation uses."""

    def predict(self, unet: nn.Module, x_BChw: Tensor, t_B: Tensor, text: TextCond, sizes_B6: Tensor) -> Tensor:
        """The U-Net's prediction for noisy latents."""

    def encode_image(self, vae: nn.Module, pixels_B3HW: Tensor, posterior_noise_B4hw: Tensor | None = None) -> Tensor:
        """Pictures to unscaled latents."""

    def decode_latents(self, vae: nn.Module, latents_B4hw: Tensor) -> Tensor:
        """Unscaled latents to pictures."""

"""Vectors of words that the text encoders did not know: the only rows that train, looked up behind the vocabulary's.

Shape letters: A added ids of all tokens together, W width of an encoder (768 and 1280 in SDXL).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.models.bundle import ModelBundle
from library.models.embedding_files import NAMES, Embedding
from library.models.tokenizers import FIRST_ADDED, ClipTokenizer

ENCODERS = dict(zip(NAMES, ("text_encoder_1", "text_encoder_2"), strict=True))


class AddedTokens(nn.Module):
    """The rows of all added tokens: parameters `clip_l` (A, W1) and `clip_g` (A, W2), in the order of the ids."""

    clip_l: nn.Parameter
    clip_g: nn.Parameter

    def __init__(self, embeddings: Mapping[str, Embedding]) -> None:
        super().__init__()
        self.counts = {word: embedding.num_vectors for word, embedding in embeddings.items()}
        for index, name in enumerate(NAMES):
            rows = torch.cat([embedding[index] for embedding in embeddings.values()]).float()
            setattr(self, name, nn.Parameter(rows.clone()))

    def tokenizer(self) -> ClipTokenizer:
        """A tokenizer that knows the words."""
        return ClipTokenizer(self.counts)

    def embeddings(self) -> dict[str, Embedding]:
        """The vectors of each token, as they are now, not copied."""
        parts = [getattr(self, name).detach().split(list(self.counts.values())) for name in NAMES]
        return {word: Embedding(*rows) for word, rows in zip(self.counts, zip(*parts, strict=True), strict=True)}

    def install(self, bundle: ModelBundle) -> None:
        """Let both encoders of `bundle` look up ids behind the vocabulary here; their own weights stay untouched.

        The bundle's tokenizer is exchanged for one that knows the words.
        """
        for name in ENCODERS:
            table = token_table(bundle, name)
            assert table.num_embeddings == FIRST_ADDED, table.num_embeddings
            # On the instance: nothing is added to the encoder's own parameters or to the names of its modules.
            table.forward = partial(_look_up, table, self, name)
        bundle.tokenizer = self.tokenizer()


def token_table(bundle: ModelBundle, name: str) -> nn.Embedding:
    """The vocabulary's vectors in the encoder that clip_l or clip_g stands for."""
    return getattr(bundle, ENCODERS[name]).get_input_embeddings()


def _look_up(table: nn.Embedding, added: AddedTokens, name: str, ids: Tensor) -> Tensor:
    """Vectors (..., W) of ids, as the vocabulary has them: dtype, device.

    Added rows take part also where no id is new, so that they always have a gradient.
    """
    rows = getattr(added, name)
    is_new = ids >= FIRST_ADDED
    old = functional.embedding(ids.clamp(max=FIRST_ADDED - 1), table.weight)
    new = functional.embedding((ids - FIRST_ADDED).clamp(min=0), rows.to(old))
    return torch.where(is_new[..., None], new, old)

"""Trains the vectors of new tokens, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from library.data.types import Batch
from library.models import checkpoint
from library.training.new_tokens import NewTokens
from library.training.trainable import ParamGroup, Part

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.models.arch import SdxlArch
    from library.models.bundle import ModelBundle


class TextualInversionTrainable:
    """The `Trainable` of `sdxl_train_textual_inversion.py` (Gal et al. 2022).

    Only the rows of the new tokens are parameters; the encoders read them beside their own frozen vocabulary, so every
    other weight keeps its bits and the optimizer has no state for it.
    """

    trains: frozenset[Part] = frozenset({"te1", "te2"})
    owns: frozenset[Part] = frozenset()
    needs: frozenset[str] = frozenset()
    loads = checkpoint.ALL_PARTS
    may_skip_modules = False

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.tokens = NewTokens(cfg)

    def check_base(self, arch: SdxlArch) -> None:
        """UserError for embedding files of another base model."""
        self.tokens.check_base(arch)

    def prepare(self, bundle: ModelBundle, *, seed: int) -> None:
        """Add the tokens to `bundle`; random starts depend on `seed` and the token's name only."""
        self.tokens.install(bundle, seed=seed)

    def attach(self, bundle: ModelBundle) -> nn.Module:
        """The module that holds the tokens' rows."""
        return self.tokens.rows

    def param_groups(self) -> list[ParamGroup]:
        """One group: the rows of both encoders."""
        rows: list[Tensor] = list(self.tokens.rows.parameters())
        return [{"name": "tokens", "params": rows, "lr": self.cfg.optim.learning_rate}]

    def forward_scope(self, batch: Batch) -> AbstractContextManager[Any]:
        """Nothing to set."""
        return nullcontext()

    def after_step(self) -> Mapping[str, Tensor]:
        """Keep the vectors' lengths near the vocabulary's (`--token_norm_decay`)."""
        return self.tokens.after_step()

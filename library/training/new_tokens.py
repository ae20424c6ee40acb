"""The new tokens of a run: what they start from, what they are trained with, how they stay in bounds, what is saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.config.dataset_file import DatasetSpec
from library.config.token_table import PLACE, TokenSpec, read_templates, template_file, token_specs
from library.data.captions import whole_captions
from library.errors import UserError
from library.log import get_logger
from library.models.added_tokens import AddedTokens, token_table
from library.models.embedding_files import NAMES, Embedding, read_embedding
from library.models.tokenizers import ClipTokenizer, load_tokenizer
from library.seeds import derive_seed

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.data.dataset import TrainData
    from library.models.arch import SdxlArch
    from library.models.bundle import ModelBundle

log = get_logger(__name__)

_NAMED = 5  # captions that a message names


class NewTokens:
    """The tokens that `cfg` names; `rows`, once they are installed, are the only weights of them.

    Embedding files are read now: a broken one is found before the model is loaded.
    """

    rows: AddedTokens

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.specs = token_specs(cfg)
        self._files = {spec.name: read_embedding(path) for spec in self.specs if (path := _file_of(spec))}
        self.counts = {spec.name: self._count(spec) for spec in self.specs}
        for spec in self.specs:
            words = load_tokenizer().encode(spec.init_word) if spec.init_word and not spec.init_file else []
            if spec.init_word and not spec.init_file and not words:
                raise UserError("init_word has no words", spec.where, "name words, or leave init_word out")
            _say_fit(spec, len(words), self.counts[spec.name])

    def _count(self, spec: TokenSpec) -> int:
        held = self._files[spec.name].num_vectors if spec.weights else None
        if held is not None and spec.num_vectors not in (None, held):
            raise UserError(
                f"{spec.weights} holds {held} vectors, and num_vectors_per_token is {spec.num_vectors}",
                spec.where,
                f"set num_vectors_per_token to {held}, or leave it out",
            )
        return held or spec.num_vectors or 1

    def tokenizer(self) -> ClipTokenizer:
        """The tokenizer that knows the tokens; needs no model."""
        return ClipTokenizer(self.counts)

    def check_base(self, arch: SdxlArch) -> None:
        """UserError for embedding files that were made for another base model than one of `arch`."""
        for spec in self.specs:
            if spec.name in self._files:
                self._files[spec.name].check_widths(arch.text_widths, where=str(_file_of(spec)))

    def fit_data(self, specs: Sequence[DatasetSpec]) -> list[DatasetSpec]:
        """The data sets with the run's sentences in the place of the captions, except for regularisation images."""
        path = template_file(self.cfg)
        if path is None:
            return list(specs)
        sentences = tuple(text.replace(PLACE, self.specs[0].name) for text in read_templates(path))
        log.info(f"{len(sentences)} sentences of {path.name} take the place of the captions")
        return [
            replace(spec, subsets=tuple(s if s.is_reg else replace(s, templates=sentences) for s in spec.subsets))
            for spec in specs
        ]

    def check_data(self, data: TrainData) -> None:
        """Say which captions hold no token. UserError for a token that no caption holds: it would learn nothing."""
        tokenizer, table = self.tokenizer(), data.table
        seen: Counter[str] = Counter()
        without, total = [], 0
        for image in table.images.tolist():
            subset = table.subset(image)
            if subset.is_reg:
                continue
            total += 1
            found = {w for text in whole_captions(table.captions.text(image), subset) for w in tokenizer.mentions(text)}
            seen.update(found)
            if not found:
                without.append(table.record(image).path)
        missing = [spec for spec in self.specs if not seen[spec.name.lower()]]
        if missing:
            raise UserError(
                f"none of the {total} captions holds the token {missing[0].name}, so it would learn nothing",
                missing[0].where,
                f"write {missing[0].name} into the captions (caption_prefix puts it before all of them), or use "
                "use_object_template or use_style_template",
            )
        if without:
            names = ", ".join(islice(without, _NAMED)) + (", …" if len(without) > _NAMED else "")
            log.warning(f"{len(without)} of {total} captions hold no new token and teach it nothing: {names}")

    def install(self, bundle: ModelBundle, *, seed: int) -> None:
        """Make the rows and have the encoders look them up. UserError for files of another model."""
        self.check_base(bundle.arch)
        self.rows = AddedTokens({spec.name: self._start(spec, bundle, seed=seed) for spec in self.specs})
        self.rows.install(bundle)
        self._files = {}
        norms = {name: mean_norm(token_table(bundle, name).weight) for name in NAMES}
        self._norms = norms
        log.info(
            "new tokens: "
            + ", ".join(f"{word} ({count} vector{'' if count == 1 else 's'})" for word, count in self.counts.items())
        )

    def _start(self, spec: TokenSpec, bundle: ModelBundle, *, seed: int) -> Embedding:
        """What a token's vectors are before the first step."""
        count, tables = self.counts[spec.name], [token_table(bundle, name).weight.detach() for name in NAMES]
        if spec.name in self._files:
            return Embedding(*(_repeated(rows, count) for rows in self._files[spec.name]))
        if spec.init_word:
            ids = load_tokenizer().encode(spec.init_word)
            return Embedding(*(_repeated(table[ids].float().cpu(), count) for table in tables))
        drawn = []
        for name, table in zip(NAMES, tables, strict=True):
            generator = torch.Generator().manual_seed(derive_seed(seed, "new token", spec.name, name))
            direction = torch.randn(count, table.shape[1], generator=generator)
            drawn.append(direction / direction.norm(dim=1, keepdim=True) * mean_norm(table))
        return Embedding(*drawn)

    @torch.no_grad()
    def after_step(self) -> dict[str, Tensor]:
        """Move the lengths of the vectors as `--token_norm_decay` says; logs their mean length in both encoders.

        n <- n + decay (m - n), with the length n of a vector and the mean m of the vocabulary's (Ryu's pivotal tuning
        does so with decay = min(1, 100 lr)).
        """
        decay, logged = self.cfg.tokens.token_norm_decay, {}
        for name in NAMES:
            rows = getattr(self.rows, name)
            norms = rows.float().norm(dim=1, keepdim=True)
            if decay:
                target = norms + decay * (self._norms[name] - norms)
                rows.mul_((target / norms.clamp(min=1e-12)).to(rows.dtype))
                norms = target
            logged[f"tokens/norm_{name}"] = norms.mean()
        return logged

    def state_of(self, dtype: torch.dtype | None) -> dict[str, dict[str, Tensor]]:
        """The tensors of each token's file, on the CPU, cast to `dtype` (None: as they are)."""
        return {
            word: {name: rows.to("cpu", dtype, copy=True) for name, rows in zip(NAMES, embedding, strict=True)}
            for word, embedding in self.rows.embeddings().items()
        }


def mean_norm(table: Tensor) -> float:
    """The mean length of a vocabulary's vectors (N, W)."""
    return float(table.detach().float().norm(dim=1).mean())


def _file_of(spec: TokenSpec) -> str | None:
    return spec.weights or spec.init_file


def _repeated(rows: Tensor, count: int) -> Tensor:
    """The first `count` rows; from the beginning again where there are too few."""
    return rows[torch.arange(count) % len(rows)]


def _say_fit(spec: TokenSpec, words: int, count: int) -> None:
    if words > count:
        log.warning(
            f'init_word "{spec.init_word}" is {words} tokens and {spec.name} has {count} vector(s): the first {count} '
            f"count; num_vectors_per_token {words} would take all of them"
        )
    elif 0 < words < count:
        log.info(f'init_word "{spec.init_word}" is {words} token(s) for {count} vectors of {spec.name}: it is repeated')

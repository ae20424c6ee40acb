"""The work of tools/merge_models.py: checkpoints into one, tensor by tensor."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from library.config.block_weights import MERGE_SLOTS, parse_block_weights, u_net_block, weight_of_block
from library.errors import UserError
from library.io.checkpoint_file import read_checkpoint
from library.io.modelspec import modelspec_metadata
from library.io.safetensors_file import TensorSource, save
from library.log import get_logger
from library.models import checkpoint, identify, prediction
from library.models.arch import PREFIXES
from library.models.convert_tool import DTYPES
from library.models.tensors import shape_of

log = get_logger(__name__)

_MODELS_OF_DIFFERENCE = 3
_MARKS = {*prediction.MARKERS, prediction.ZERO_SNR_MARKER}


@dataclass(frozen=True)
class Recipe:
    """What is added up: a share of each model, changed by block weights for all but the first.

    shares: one number a model. weights: block weights of the models after the first; empty for none. What a block's
    weight takes from a model's share goes to the first, so that each block's shares have the same sum.
    """

    shares: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...] = ()
    unet_only: bool = False

    def shares_of(self, key: str) -> tuple[float, ...]:
        """The share of each model in the tensor `key`."""
        if self.unet_only and not key.startswith(PREFIXES["unet"]):
            return (1.0, *[0.0] * (len(self.shares) - 1))
        if not self.weights:
            return self.shares
        pairs = zip(self.shares[1:], self.weights, strict=True)
        others = tuple(share * weight_of_block(_block_of(key), weights) for share, weights in pairs)
        return (self.shares[0] + sum(self.shares[1:]) - sum(others), *others)


@dataclass
class Merged(Mapping[str, Tensor]):
    """The merged tensors, each computed when it is asked for; `items()` shows their shapes and dtypes only.

    sources: the models' tensors by single-file key. precision: what is computed in, saving: what floating-point tensors
    become. lacking: keys that a model lacks, for which the first stands in.
    """

    sources: Sequence[Mapping[str, Tensor]]
    recipe: Recipe
    precision: torch.dtype
    saving: torch.dtype
    where: Sequence[str]
    lacking: dict[str, str] = field(default_factory=dict)
    _done: int = 0

    def __post_init__(self) -> None:
        first = self.sources[0]
        for key in first:
            shape = shape_of(first, key)
            for source, where in zip(self.sources[1:], self.where[1:], strict=True):
                if key not in source:
                    self.lacking.setdefault(key, where)
                elif shape_of(source, key) != shape:
                    raise UserError(
                        f"{key} has shape {shape_of(source, key)}, in {self.where[0]} {shape}",
                        where,
                        "merge models of one architecture",
                    )

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources[0])

    def __len__(self) -> int:
        return len(self.sources[0])

    def items(self) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]  # the writer asks for shapes only
        """Names with empty tensors on the meta device, of the shape and dtype of the merged ones."""
        for key in self:
            tensor = self.sources[0][key]
            dtype = self.saving if tensor.is_floating_point() else tensor.dtype
            yield key, torch.empty(tensor.shape, dtype=dtype, device="meta")

    def __getitem__(self, key: str) -> Tensor:
        self._report()
        first = self.sources[0][key]
        if not first.is_floating_point() or not first.numel():
            return first.to(self.saving) if first.is_floating_point() else first
        shares = self.recipe.shares_of(key)
        there = [share for share, source in zip(shares, self.sources, strict=True) if share and key in source]
        if len(there) == 1 and shares[0] == 1.0:
            return first.to(self.saving)
        own = sum(share for share, source in zip(shares, self.sources, strict=True) if key not in source)
        total = first.to(self.precision) * (shares[0] + own)
        for share, source in zip(shares[1:], self.sources[1:], strict=True):
            if share and key in source:
                total += source[key].to(self.precision) * share
        result = total.to(self.saving)
        if not torch.isfinite(result).all():
            raise UserError(
                f"{key} is not finite after merging (NaN, infinity, or too large for {self.saving})",
                " and ".join(self.where),
                "check the models; save in bf16 or float where values are too large for fp16",
            )
        return result

    def _report(self) -> None:
        self._done += 1
        tenth = max(len(self) // 10, 1)
        if self._done % tenth == 0:
            log.info("merged %d of %d tensors", self._done, len(self))


def _block_weights(text: str) -> tuple[float, ...]:
    try:
        return parse_block_weights(text, MERGE_SLOTS)
    except ValueError as error:
        raise UserError(f"a list of block weights {error}", "--lbws", "write [1,1,0.5,...]") from None


def _block_of(key: str) -> int | None:
    """The U-Net block of a single-file key, None for text encoders and VAE."""
    prefix = PREFIXES["unet"]
    return u_net_block(key.removeprefix(prefix)) if key.startswith(prefix) else None


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The shares that the flags ask for. Raises UserError for counts that do not go together."""
    count, ratios = len(arguments.models), arguments.ratios or []
    weights = tuple(_block_weights(text) for text in arguments.lbws or [])
    if arguments.add_difference:
        if count != _MODELS_OF_DIFFERENCE or len(ratios) > 1 or len(weights) > 1:
            raise UserError(
                f"add_difference has {count} models, {len(ratios)} ratios, {len(weights)} lists of block weights",
                "--add_difference",
                "give three models A B C, at most one ratio and one list: A + (B - C) x ratio",
            )
        ratio = ratios[0] if ratios else 1.0
        return Recipe((1.0, ratio, -ratio), weights * 2, arguments.unet_only)
    if count < 2:
        raise UserError("one model is nothing to merge", "--models", "name two or more")
    if ratios and len(ratios) != count:
        raise UserError(f"{len(ratios)} ratios for {count} models", "--ratios", "give one for each, or none")
    if weights and len(weights) != count - 1:
        raise UserError(
            f"{len(weights)} lists of block weights for {count} models",
            "--lbws",
            "give one for each model but the first",
        )
    if not ratios:
        ratios = [0.0, *[1 / (count - 1)] * (count - 1)] if weights else [1 / count] * count
    return Recipe(tuple(ratios), weights, arguments.unet_only)


def run(arguments: argparse.Namespace) -> int:
    """Merge `arguments.models` into `arguments.output`; prints shares and what was skipped."""
    recipe = recipe_of(arguments)
    target = Path(arguments.output)
    if target.suffix != ".safetensors":
        raise UserError("only safetensors files are written", str(target), "let its name end in .safetensors")
    paths = [checkpoint.resolve_checkpoint(name) for name in arguments.models]
    for name, path in zip(arguments.models, paths, strict=True):
        if path.is_dir():
            raise UserError("a folder cannot be merged", name, "make a single file of it: tools/convert_checkpoint.py")
        if target.exists() and target.resolve() == path:
            raise UserError("the result would take the place of its source", str(target), "choose another name")
    with ExitStack() as stack:
        sources = [stack.enter_context(read_checkpoint(path, mmap=False)) for path in paths]
        _check(sources, arguments.models)
        merged = Merged(
            sources, recipe, DTYPES[arguments.precision], DTYPES[arguments.saving_precision], arguments.models
        )
        only_later = [
            (key, name)
            for source, name in zip(sources[1:], arguments.models[1:], strict=True)
            for key in source
            if key not in sources[0]
        ]
        save(merged, target, _metadata(sources[0], arguments.models, target), checked=True)
    print(f"{len(merged)} tensors: {_words(arguments.models, recipe)} -> {target}")
    _say_skipped(merged.lacking, only_later, all_of_them=arguments.show_skipped)
    return 0


def _check(sources: Sequence[TensorSource], names: Sequence[str]) -> None:
    stated = []
    for source, name in zip(sources, names, strict=True):
        identify.refuse_other_models(source, where=name)
        found = prediction.of_single_file(source, source.metadata, where=name)
        stated.append((found.prediction_type or "epsilon", found.zero_terminal_snr))
    for one, name in zip(stated[1:], names[1:], strict=True):
        if one[0] != stated[0][0]:
            raise UserError(
                f"{names[0]} predicts {stated[0][0]}, {name} predicts {one[0]}", name, "merge models of one type"
            )
        if one != stated[0]:
            log.warning(f"{names[0]} and {name} differ in zero terminal SNR; the result is marked as the first")


def _metadata(first: TensorSource, names: Sequence[str], target: Path) -> dict[str, str]:
    """modelspec entries of the new file, with the first model's architecture facts and prediction type."""
    kept = {key: value for key, value in first.metadata.items() if key.startswith(("arch.", prediction.FLOW_SHIFT))}
    found = prediction.of_single_file(first, first.metadata, where=names[0])
    return {
        "format": "pt",
        **kept,
        **modelspec_metadata(
            "checkpoint",
            created=datetime.now(),
            title=target.stem,
            prediction_type=found.prediction_type or "epsilon",
            fields={"merged_from": ", ".join(Path(name).stem for name in names)},
        ),
    }


def _words(names: Sequence[str], recipe: Recipe) -> str:
    terms = [f"{share:g} x {Path(name).stem}" for name, share in zip(names, recipe.shares, strict=True)]
    return " + ".join(terms) + (" with block weights" if recipe.weights else "")


def _say_skipped(lacking: Mapping[str, str], only_later: Sequence[tuple[str, str]], *, all_of_them: bool) -> None:
    real = {key: name for key, name in lacking.items() if key not in _MARKS}
    if real:
        print(f"note: {len(real)} tensors are not in every model; the first stands in for it (--show_skipped)")
    if only_later:
        print(f"note: {len(only_later)} tensors that the first model lacks were left out (--show_skipped)")
    for key, name in [*real.items(), *only_later] if all_of_them else ():
        print(f"  {key} ({name})")

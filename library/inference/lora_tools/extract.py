"""Extracting a LoRA: the change between two checkpoints, module by module, as its best factors of a rank."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from library.data.progress import progress_bar
from library.errors import UserError
from library.inference.lora_tools.files import rank_and_alpha, stem_of
from library.inference.lora_tools.model import StreamedModel
from library.inference.lora_tools.report import ErrorSums
from library.inference.lora_tools.writing import NetworkWriter, minimal_metadata, spec_metadata
from library.log import get_logger
from networks._algebra import clamped, factors_of, svd_of_matrix
from networks._keys import Target

log = get_logger(__name__)


@dataclass(frozen=True)
class Extraction:
    """How to extract: ranks of linear and 1x1 modules and of convolutions (None: none), and the numbers' handling.

    clamp_quantile cuts both factors off at that quantile of their values (1: nothing is cut). min_diff: text encoders
    are left out unless some weight of theirs changed by more. load_dtype: what both models are rounded to before
    they are compared. iterations: None decomposes exactly, a number takes the randomised method.
    """

    dim: int
    conv_dim: int | None = None
    clamp_quantile: float = 0.99
    min_diff: float = 0.01
    load_dtype: torch.dtype | None = None
    iterations: int | None = None
    device: str = "cpu"
    original_device: str = "cpu"
    tuned_device: str = "cpu"

    def rank_of(self, target: Target) -> int:
        """The rank of a module, at most as many as its weight has singular values."""
        shape = tuple(target.module.weight.shape)
        wanted = self.conv_dim if target.is_spatial_conv and self.conv_dim else self.dim
        return min(wanted, shape[0], math.prod(shape[1:]))


class _Pair:
    """The two models; the tuned one's modules are looked up by the original's targets."""

    def __init__(self, original: str, tuned: str, how: Extraction, stack: ExitStack) -> None:
        self.original, self.tuned, self.how = StreamedModel(original, stack), StreamedModel(tuned, stack), how
        for part in ("unet", "text_encoder_1", "text_encoder_2"):
            if getattr(self.original.arch, part) != getattr(self.tuned.arch, part):
                raise UserError(
                    f"the two models are not of one kind: their {part} differs in size",
                    f"{original}, {tuned}",
                    "give the checkpoint that the tuned model was made from",
                )
        self._targets = {target.name: target for target in self.tuned.targets()}

    def delta(self, target: Target) -> Tensor:
        """tuned - original as float32 on the computing device, in the weight's shape. UserError for NaN."""
        how = self.how
        pieces = (
            (self.tuned, self._targets[target.name], how.tuned_device),
            (self.original, target, how.original_device),
        )
        found = []
        for model, place, device in pieces:
            weight = model.weight(place).to(device)
            weight = (weight if how.load_dtype is None else weight.to(how.load_dtype)).float()
            if not torch.isfinite(weight).all():
                raise UserError(f"{target.name} holds NaN or infinity", model.where, "use an earlier save of the model")
            found.append(weight.to(how.device))
        return found[0] - found[1]


def extract(
    original: str, tuned: str, save_to: str, how: Extraction, *, save_dtype: torch.dtype | None, **told
) -> None:
    """Write the LoRA that turns `original` into `tuned`, as well as `how` allows; prints the error norms.

    Modules are those that training adapts (with a conv_dim also the U-Net's convolutions). alpha = rank.
    told: `v_parameterization` marks the LoRA as one for a v-prediction model (otherwise as the tuned model says);
    `with_metadata` False leaves the comment out. Raises UserError for models of
    different sizes and for equal ones.
    """
    with ExitStack() as stack, torch.no_grad():
        pair = _Pair(original, tuned, how, stack)
        targets = list(pair.original.targets(default=True, with_conv=how.conv_dim is not None))
        targets = _without_equal_text(pair, targets)
        writer = stack.enter_context(NetworkWriter(save_to, save_dtype))
        errors = {part: ErrorSums(part) for part in ("te1", "te2", "unet")}
        with progress_bar(len(targets), title="extract", unit="module") as bar:
            for target in targets:
                _extract_one(pair, target, writer, errors[target.part])
                bar.update()
        if not any(sums.wanted for sums in errors.values()):
            raise UserError("the two models do not differ", f"{original}, {tuned}", "give the tuned model")
        writer.finish(_metadata(pair, writer, **told))
    for line in ErrorSums.table(list(errors.values()), "of the rank, the clamping and the stored numbers"):
        print(line)
    if how.clamp_quantile < 1:
        print(f"values are clamped at the {how.clamp_quantile:g} quantile; --clamp_quantile 1 leaves them as they are")


def _extract_one(pair: _Pair, target: Target, writer: NetworkWriter, sums: ErrorSums) -> None:
    delta = pair.delta(target)
    matrix_OI, rank = delta.flatten(1), pair.how.rank_of(target)
    factors = factors_of(svd_of_matrix(matrix_OI, rank, iterations=pair.how.iterations), rank)
    written = writer.add(target.name, clamped(factors, pair.how.clamp_quantile), rank, tuple(delta.shape))
    sums.add(matrix_OI, written.up_Or @ written.down_rI - matrix_OI)


def _without_equal_text(pair: _Pair, targets: list[Target]) -> list[Target]:
    """The targets without those of the text encoders when none of their weights changed by more than min_diff."""
    text = [target for target in targets if target.part != "unet"]
    largest = 0.0
    with progress_bar(len(text), title="compare text encoders", unit="module") as bar:
        for target in text:
            largest = max(largest, float(pair.delta(target).abs().max()))
            bar.update()
    if largest > pair.how.min_diff:
        return targets
    log.info(
        "text encoders are left out: their largest difference is %.3g, at most min_diff %g", largest, pair.how.min_diff
    )
    return [target for target in targets if target.part == "unet"]


def _metadata(pair: _Pair, writer: NetworkWriter, *, v_parameterization: bool, with_metadata: bool) -> dict[str, str]:
    how = pair.how
    dim, alpha = str(how.dim), str(float(how.dim))
    if how.conv_dim is None:  # narrow modules may have smaller ranks
        dim, alpha = rank_and_alpha(writer.ranks.values())
    args = json.dumps({"conv_dim": str(how.conv_dim), "conv_alpha": str(float(how.conv_dim))}) if how.conv_dim else None
    stated = pair.tuned.opened.stated.prediction_type
    found = minimal_metadata(dim, alpha, args=args)
    found |= spec_metadata(writer.path, prediction="v" if v_parameterization else stated)
    if with_metadata:
        names = f"{stem_of(pair.tuned.where)} - {stem_of(pair.original.where)}"
        found |= {"ss_training_comment": f"extracted from {names}", "ss_output_name": stem_of(writer.path)}
    return found

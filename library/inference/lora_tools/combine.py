"""LoRA with LoRA: the exact sum as one LoRA of added ranks, or the best LoRA of a given rank."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch

from library.data.progress import progress_bar
from library.errors import UserError
from library.inference.lora_tools.files import LoraFile, LowRank, rank_and_alpha, stem_of
from library.inference.lora_tools.merge_model import Source
from library.inference.lora_tools.names import part_of
from library.inference.lora_tools.report import ErrorSums
from library.inference.lora_tools.writing import NetworkWriter, minimal_metadata, spec_metadata
from library.log import get_logger
from networks._algebra import Factors, factors_of, svd_of_product
from networks._block_weights import block_factor

log = get_logger(__name__)


class _Stack:
    """The files to be merged with their modules by sd-scripts' name."""

    def __init__(self, sources: Sequence[Source], stack: ExitStack) -> None:
        self.sources = sources
        self.files = [LoraFile(source.path, stack) for source in sources]
        self.tables: list[dict[str, LowRank]] = [file.renamed() for file in self.files]
        for file in self.files:
            file.check_values()
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file, table in zip(self.files, self.tables, strict=True):
            for name, module in table.items():
                if self.shapes.setdefault(name, module.shape) != module.shape:
                    raise UserError(
                        f"{name} is for a weight of shape {module.shape}, in an earlier file of {self.shapes[name]}",
                        file.where,
                        "merge LoRAs of one and the same kind of model",
                    )

    def factors(self, name: str) -> Factors:
        """All files' factors of one module side by side: up @ down is the sum of ratio * weight * alpha / r * delta.

        The size of a file's factor is shared between its two matrices, its sign is in up.
        """
        ups, downs = [], []
        for source, file, table in zip(self.sources, self.files, self.tables, strict=True):
            if name not in table:
                continue
            factor = source.ratio * block_factor(name, source.blocks) * table[name].scale
            up, down = file.factors(table[name])
            share = math.sqrt(abs(factor))
            ups.append(up * math.copysign(share, factor))
            downs.append(down * share)
        return Factors(torch.cat(ups, 1), torch.cat(downs))


def combine(
    sources: Sequence[Source],
    save_to: str,
    *,
    save_dtype: torch.dtype | None,
    new_rank: int | None = None,
    new_conv_rank: int | None = None,
    shuffle: bool = False,
    device: str = "cpu",
    with_metadata: bool = True,
) -> None:
    """Write one LoRA whose change is the sum of ratio * block weight * change of the sources.

    Without new_rank the sum is exact and the ranks add up (alpha = rank). With it, every module is the best
    approximation of rank new_rank (3x3 and other 4-D modules: new_conv_rank, or new_rank where that is None). shuffle
    permutes the ranks, which changes nothing in the sum. Prints the error norms. Raises UserError.
    """
    with ExitStack() as stack:
        found = _Stack(sources, stack)
        errors: dict[str, ErrorSums] = {}
        writer = stack.enter_context(NetworkWriter(save_to, save_dtype))
        bar = stack.enter_context(progress_bar(len(found.shapes), title="merge", unit="module"))
        generator = torch.Generator().manual_seed(0)
        for name, shape in found.shapes.items():
            whole = Factors(*(factor.to(device) for factor in found.factors(name)))
            made = whole
            if new_rank is not None:
                wanted = (new_conv_rank or new_rank) if len(shape) == 4 else new_rank
                made = factors_of(svd_of_product(*whole), min(wanted, shape[0], math.prod(shape[1:])))
            if shuffle:
                order = torch.randperm(len(made.down_rI), generator=generator).to(device)
                made = Factors(made.up_Or[:, order], made.down_rI[order])
            written = writer.add(name, made, len(made.down_rI), shape)
            delta = whole.up_Or @ whole.down_rI
            sums = errors.setdefault(part_of(name), ErrorSums(part_of(name)))
            sums.add(delta, written.up_Or @ written.down_rI - delta)
            bar.update()
        if not any(one.wanted for one in errors.values()):
            log.warning("the merged LoRA changes nothing: every ratio or block weight that counts is 0")
        args = None
        if new_rank is not None:
            rank = new_conv_rank or new_rank
            args = json.dumps({"conv_dim": str(rank), "conv_alpha": str(float(rank))})
        writer.finish(_metadata(found, writer, args, with_metadata))
    for line in ErrorSums.table(list(errors.values()), "against the exact sum"):
        print(line)


def _metadata(found: _Stack, writer: NetworkWriter, args: str | None, with_metadata: bool) -> Mapping[str, str]:
    dim, alpha = rank_and_alpha(writer.ranks.values())
    bases = {file.metadata.get("ss_base_model_version") for file in found.files} - {None}
    metadata = minimal_metadata(dim, alpha, args=args, base=bases.pop() if len(bases) == 1 else None)
    kinds = {file.metadata.get("modelspec.prediction_type") for file in found.files} - {None}
    if len(kinds) > 1:
        log.warning("the LoRAs are for models of different prediction types: %s", ", ".join(sorted(map(str, kinds))))
    prediction = kinds.pop() if len(kinds) == 1 else None
    if not with_metadata:
        return metadata | spec_metadata(writer.path, prediction=prediction)
    recipe = [
        f"{stem_of(source.path)} x {source.ratio:g}"
        + (f" lbw [{', '.join(f'{v:g}' for v in source.blocks)}]" if source.blocks else "")
        for source in found.sources
    ]
    merged_from = ", ".join(file.metadata.get("modelspec.title") or stem_of(file.where) for file in found.files)
    metadata["ss_training_comment"] = "merged from " + " + ".join(recipe)
    return metadata | spec_metadata(writer.path, prediction=prediction, merged_from=merged_from)

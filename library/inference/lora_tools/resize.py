"""Giving a LoRA another rank: a fixed one, or one for each module by a rule on its singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from library.data.progress import progress_bar
from library.inference.lora_tools.files import LoraFile, LowRank, rank_and_alpha
from library.inference.lora_tools.names import part_of
from library.inference.lora_tools.report import ErrorSums
from library.inference.lora_tools.writing import NetworkWriter
from networks._algebra import DynamicMethod, Factors, Retained, Svd, dynamic_rank, factors_of, svd_of_product


@dataclass(frozen=True)
class RankRule:
    """new_rank (4-D weights: new_conv_rank) as it is or, with a dynamic method, as the largest that its rule may give.

    param is the rule's threshold, as in `networks._algebra.dynamic_rank`.
    """

    new_rank: int
    new_conv_rank: int
    method: DynamicMethod | None = None
    param: float = 0.0

    def rank_of(self, module: LowRank, svd: Svd) -> int:
        """The new rank of a module; at most as many as its weight has singular values."""
        values = min(module.shape[0], math.prod(module.shape[1:]))
        cap = self.new_conv_rank if module.is_conv else self.new_rank
        if self.method is None:
            return min(cap, values)
        return dynamic_rank(svd.s_r, num_values=values, method=self.method, param=self.param, cap=cap)


def resize(
    path: str,
    save_to: str,
    rule: RankRule,
    *,
    save_dtype: torch.dtype | None,
    device: str = "cpu",
    verbose: bool = False,
) -> None:
    """Write the LoRA `path` with new ranks; alpha / rank, and with it the strength, stays as it is in every module.

    Names and their spelling (lora_down/up, lora_A/B, down/up) stay. save_dtype None keeps the file's. Prints error
    norms and, with `verbose`, a line for each module. Raises UserError.
    """
    with ExitStack() as stack:
        file = LoraFile(path, stack)
        file.check_values()
        dtype = save_dtype or file.source[next(iter(file.modules.values())).down_key].dtype
        writer = stack.enter_context(NetworkWriter(save_to, dtype))
        bar = stack.enter_context(progress_bar(len(file.modules), title="resize", unit="module"))
        errors: dict[str, ErrorSums] = {}
        for module in file.modules.values():
            up, down = (factor.to(device) for factor in file.factors(module))
            svd = svd_of_product(up, down)
            rank = rule.rank_of(module, svd)
            keys = (module.down_key, module.up_key, module.alpha_key)
            written = writer.add_keys(keys, factors_of(svd, rank), module.scale * rank, module.shape)
            sums = errors.setdefault(part_of(module.name), ErrorSums(part_of(module.name)))
            _count(sums, Factors(up, down), written, module.scale)
            if verbose:
                bar.write(_line(module, svd, rank))
            bar.update()
        writer.finish(_metadata(file, writer, rule))
    for line in ErrorSums.table(list(errors.values()), "of the smaller rank and the stored numbers"):
        print(line)
    ranks = [rank for rank, _ in writer.ranks.values()]
    print(f"ranks {min(ranks)} to {max(ranks)}, on average {sum(ranks) / len(ranks):.1f}")


def _count(sums: ErrorSums, before: Factors, after: Factors, scale: float) -> None:
    """Add a module's norms; both changes have the same alpha / rank."""
    wanted = scale * (before.up_Or @ before.down_rI)
    sums.add(wanted, scale * (after.up_Or @ after.down_rI) - wanted)


def _line(module: LowRank, svd: Svd, rank: int) -> str:
    kept = Retained.of(svd.s_r, rank)
    return (
        f"{module.name}: rank {module.rank} -> {rank}, sum retained {kept.sum:.1%}, "
        f"Frobenius norm retained {kept.frobenius:.1%}, largest / smallest kept {kept.ratio:.3g}"
    )


def _metadata(file: LoraFile, writer: NetworkWriter, rule: RankRule) -> Mapping[str, str]:
    metadata = {key: value for key, value in file.metadata.items() if not key.startswith("sshs_")}
    old, _ = rank_and_alpha((module.rank, module.alpha) for module in file.modules.values())
    comment = metadata.get("ss_training_comment", "")
    if rule.method is None:
        conv = "" if rule.new_conv_rank == rule.new_rank else f" (4-D weights {rule.new_conv_rank})"
        told = f"rank {old} resized to {rule.new_rank}{conv}"
        dim, alpha = rank_and_alpha(writer.ranks.values())
    else:
        told = f"rank {old} resized by {rule.method} {rule.param:g}, at most {rule.new_rank}"
        dim = alpha = "Dynamic"
    metadata["ss_training_comment"] = told if comment in ("", "None") else f"{told}; {comment}"
    return metadata | {"ss_network_dim": dim, "ss_network_alpha": alpha}

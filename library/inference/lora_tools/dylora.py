"""Taking the smaller networks out of a DyLoRA: the first rows and columns are a LoRA of their own."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path

from library.errors import UserError
from library.inference.lora_tools.files import LoraFile
from library.inference.lora_tools.writing import NetworkWriter
from library.log import get_logger
from networks._algebra import Factors

log = get_logger(__name__)


def extract_units(path: str, save_to: str, unit: int, *, as_trained: bool = False) -> list[Path]:
    """Write the networks of rank unit, 2 unit, ... below the file's rank R, as <save_to's stem>-0004.safetensors.

    down[:k] and up[:, :k] of every module, in the file's dtype. alpha stays as it is, as in sd-scripts, so that the
    strength is alpha / k, which is what this suite trains with; as_trained stores alpha * sqrt(k / R) instead, which
    gives the strength that sd-scripts' training has at rank k, alpha / R * sqrt(R / k). Returns the files. Raises
    UserError when unit does not fit the rank.
    """
    target = Path(save_to)
    written = []
    with ExitStack() as stack:
        file = LoraFile(path, stack)
        file.check_values()
        ranks = {module.rank for module in file.modules.values()}
        largest = max(ranks)
        if len(ranks) > 1:
            raise UserError(f"the modules have ranks {sorted(ranks)}: no DyLoRA is like that", path, "give a DyLoRA")
        if largest % unit or unit >= largest:
            divisors = [str(n) for n in range(1, largest) if largest % n == 0]
            raise UserError(
                f"unit {unit} does not divide the file's rank {largest} into smaller ranks",
                "--unit",
                f"give one of {', '.join(divisors)}" if divisors else "a network of rank 1 has nothing inside",
            )
        for rank in range(unit, largest, unit):
            final = target.with_name(f"{target.stem}-{rank:04d}{target.suffix}")
            _write(file, final, rank, math.sqrt(rank / largest) if as_trained else 1.0)
            written.append(final)
    return written


def _write(file: LoraFile, final: Path, rank: int, share: float) -> None:
    first = next(iter(file.modules.values()))
    with NetworkWriter(str(final), file.source[first.down_key].dtype) as writer:
        for module in file.modules.values():
            up, down = file.factors(module)
            keys = (module.down_key, module.up_key, module.alpha_key)
            writer.add_keys(keys, Factors(up[:, :rank], down[:rank]), module.alpha * share, module.shape)
        alphas = {alpha for _, alpha in writer.ranks.values()}
        kept = {key: value for key, value in file.metadata.items() if not key.startswith("sshs_")}
        alpha = str(alphas.pop()) if len(alphas) == 1 else "Dynamic"
        writer.finish(
            kept
            | {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": alpha}
            | {"ss_training_comment": f"rank {rank} of a DyLoRA of rank {first.rank}"}
        )

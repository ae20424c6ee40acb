"""Which share of a run's pictures this process draws, as accelerate launch and torchrun say it. No torch.

No process group is made: every rank plans the whole run in the same way and takes what is its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    from library.config.run_config import RunConfig


@dataclass(frozen=True)
class Share:
    """Every num_ranks-th batch from number `rank` (from 0) on; local_rank counts the processes of one machine."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0

    def has(self, batch: int) -> bool:
        """Whether batch number `batch` (from 0) is this rank's."""
        return batch % self.num_ranks == self.rank


def share_of(cfg: RunConfig, environment: Mapping[str, str] = os.environ) -> Share:
    """This process's share: everything outside of a launcher.

    UserError when a launcher has started several processes and nothing says that they share the work: they would
    all draw the same into the same files.
    """
    rank, count, local = (
        int(environment.get(name) or default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if count > 1 and not cfg.pictures.prompts_per_rank:
        what = f"{count} processes were started, and each would draw all pictures into the same files"
        raise UserError(what, "prompts_per_rank", "add --prompts_per_rank, or start one process")
    return Share(rank, count, local)

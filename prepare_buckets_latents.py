"""Encode a metadata file's images and note their buckets in it.

`python prepare_buckets_latents.py FOLDER IN.json OUT.json MODEL`, also under `accelerate launch`, and on several CPU
processes `torchrun --nproc_per_node 2`. Goes on where it was stopped.
"""

from __future__ import annotations

import sys

from library.config.prepare_buckets import read_request
from library.errors import entry_point
from library.log import current_rank, setup_logging


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the arguments (before torch is imported), fill the cache, write the file; returns the exit code."""
    request = read_request(argv)
    setup_logging()
    from library.inference.prepare_buckets import prepare

    prepared = prepare(request)
    if current_rank() == 0:
        print("\n".join(prepared.lines()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One of two real processes: builds text caches in memory and prints what it ended with (see test_exchange.py)."""

import json
from datetime import timedelta

import torch

from library.data.assemble import assemble
from library.data.text_caching import TextCacheOptions, build_text
from tests.data.specs import dataset, subset
from tests.data.variants import SHUFFLE, Encoder


def found(folder: str, *, rank: int, world: int) -> dict:
    """What a rank has after a pass, and what it has done for it."""
    images, _ = assemble([dataset(subset(folder, **SHUFFLE))])
    encode = Encoder()
    options = TextCacheOptions("te", 1, num_variants=3, batch_size=2)
    store, report = build_text(images, encode, options=options, rank=rank, world=world)
    rows = [store.get(image, variant=k).pooled_BP[0].tolist() for image in images.images.tolist() for k in range(3)]
    return {"line": report.line(), "rows": rows, "encoded": sorted(encode.captions)}


def main(argv: list[str]) -> None:
    """A pass as on CPUs, then two on the way of ranks with GPUs, whose own group takes no objects."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    (folder,) = argv
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    passes = [found(folder, rank=rank, world=world)]
    made = []
    new_group = torch.distributed.new_group
    torch.distributed.get_backend = lambda *_: "nccl"
    torch.distributed.new_group = lambda **options: made.append(options["backend"]) or new_group(**options)
    passes += [found(folder, rank=rank, world=world) for _ in range(2)]
    for turn in range(world):
        torch.distributed.barrier()
        if turn == rank:
            print(json.dumps({"rank": rank, "passes": passes, "groups": made}), flush=True)
    torch.distributed.destroy_process_group()

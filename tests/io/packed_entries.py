"""Small packed caches for the tests: entries whose content follows from their id, and the content of a whole store."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from library.io.packed_record import SHARD_SUFFIX
from library.io.packed_store import PackedStore
from library.io.packed_writer import PackedWriter

FACTS = np.dtype([("bytes", "<i8"), ("hash", "u1", (16,))])
RECIPE = '{"vae": "tiny"}'

Content = dict[int, tuple[str, bytes, str, dict[str, bytes]]]


def arrays_of(number: int, version: int = 0) -> dict[str, np.ndarray]:
    """Two arrays, of a size that depends on the number."""
    shape = (4, 1 + number % 3, 5)
    latents = np.arange(np.prod(shape), dtype=np.float16).reshape(shape) + np.float16(number % 100 + version)
    return {"latents": latents, "mean": np.array(number * 1000 + version)}


def facts_of(number: int, version: int = 0) -> tuple[int, np.ndarray]:
    """Facts that differ from entry to entry and from version to version."""
    return number + 10_000 * version, np.full(16, number % 251, np.uint8)


def append(writer: PackedWriter, number: int, version: int = 0) -> None:
    """Store one version of entry `number`; its id is spread over the 64 bits."""
    writer.append(
        id_of(number), arrays_of(number, version), key=f"bild {number}.png ü", facts=facts_of(number, version)
    )


def id_of(number: int) -> int:
    """The id of an entry."""
    return (number + 1) * 0x9E3779B97F4A7C15 % 2**64


def expected(versions: dict[int, int], recipe: str = RECIPE) -> Content:
    """What a store must hold that has these entries (number -> version)."""
    return {
        id_of(number): (
            f"bild {number}.png ü",
            np.array(facts_of(number, version), FACTS).tobytes(),
            recipe,
            {name: array.tobytes() for name, array in arrays_of(number, version).items()},
        )
        for number, version in versions.items()
    }


def content(store: PackedStore) -> Content:
    """Everything that counts in a store."""
    positions = store.live()
    found = {}
    for position, entry_id, facts, recipe in zip(
        positions.tolist(), store.column("id", positions), store.facts(positions), store.recipe_of(positions)
    ):
        arrays = {name: array.tobytes() for name, array in store.read(position).items()}
        found[int(entry_id)] = (store.key(position), facts.tobytes(), store.recipes[recipe], arrays)
    return found


def open_store(folder: Path) -> PackedStore:
    """Open with the facts of these entries."""
    return PackedStore.open(folder, facts_dtype=FACTS)


def writer_of(folder: Path, recipe: str = RECIPE, shard_bytes: int = 1 << 30) -> PackedWriter:
    """A writer with the facts of these entries."""
    return PackedWriter(folder, recipe=recipe, facts_dtype=FACTS, shard_bytes=shard_bytes)


def shards_of(folder: Path) -> list[Path]:
    """The shards of a folder by name."""
    return sorted(folder.glob(f"*{SHARD_SUFFIX}"))

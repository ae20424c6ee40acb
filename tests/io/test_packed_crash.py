"""The packed cache under accidents: torn tails, wrong bytes, killed writers, writers at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from library.io.packed_record import FIXED
from library.io.packed_store import PackedStore
from tests.io.packed_entries import append, content, expected, id_of, open_store, shards_of, writer_of

ROOT = Path(__file__).resolve().parents[2]


def written(folder: Path, numbers: range) -> tuple[Path, list[int]]:
    """One shard with these entries; returns it and where each record ends."""
    ends = []
    with writer_of(folder) as writer:
        for number in numbers:
            append(writer, number)
            ends.append(shards_of(folder)[0].stat().st_size)
    return shards_of(folder)[0], ends


@pytest.mark.parametrize("index", ["no index", "index"])
def test_a_shard_cut_anywhere_keeps_exactly_the_whole_records(tmp_path, index):
    shard, ends = written(tmp_path, range(4))
    if index == "index":
        assert open_store(tmp_path).save_index()
    for size in range(ends[-1] - 1, -1, -1):
        os.truncate(shard, size)
        store = open_store(tmp_path)
        whole = [number for number, end in enumerate(ends) if end <= size]
        assert content(store) == expected(dict.fromkeys(whole, 0)), size
        assert not store.ignored


def test_a_record_that_is_being_written_is_seen_when_it_is_whole(tmp_path):
    shard, ends = written(tmp_path, range(3))
    data = shard.read_bytes()
    for cut in (1, 30, 100, ends[0] - 1, ends[0] + 8, ends[1] + FIXED.size + 1, ends[2] - 1):
        shard.write_bytes(data[:cut])
        store = open_store(tmp_path)
        store.save_index()
        before = len(store)
        for part in (data[cut : cut + 1], data[cut + 1 :]):
            with open(shard, "ab") as file:
                file.write(part)
            before += store.refresh()
        assert before == 3
        assert content(store) == content(open_store(tmp_path)) == expected(dict.fromkeys(range(3), 0)), cut


def test_a_record_whose_bytes_come_after_its_length_is_not_lost(tmp_path):
    shard, ends = written(tmp_path, range(3))
    data = shard.read_bytes()
    shard.write_bytes(data[: ends[1] - 64] + bytes(64))  # as on a network file system
    store = open_store(tmp_path)
    assert content(store) == expected({0: 0})
    shard.write_bytes(data)
    assert store.refresh() == 2
    assert content(store) == expected(dict.fromkeys(range(3), 0))


def test_a_shard_that_was_cut_and_completed_again_is_whole(tmp_path):
    shard, ends = written(tmp_path, range(3))
    data = shard.read_bytes()
    assert open_store(tmp_path).save_index()
    os.truncate(shard, ends[1] - 1)
    store = open_store(tmp_path)
    assert content(store) == expected({0: 0})
    shard.write_bytes(data)
    assert store.refresh() == 2
    assert content(store) == expected(dict.fromkeys(range(3), 0))


def test_a_wrong_byte_anywhere_in_a_record_costs_this_record(tmp_path):
    shard, ends = written(tmp_path, range(3))
    data = bytearray(shard.read_bytes())
    others = expected({0: 0, 2: 0})
    for place in range(ends[0], ends[1]):
        data[place] ^= 0x41
        shard.write_bytes(data)
        data[place] ^= 0x41
        assert content(open_store(tmp_path)) == others, place


def test_pages_of_zeros_after_a_power_cut_cost_what_they_cover(tmp_path):
    shard, ends = written(tmp_path, range(6))
    data = bytearray(shard.read_bytes())
    data[ends[0] + 10 : ends[2] + 20] = bytes(ends[2] - ends[0] + 10)
    shard.write_bytes(data + bytes(4096))
    assert content(open_store(tmp_path)) == expected({0: 0, 4: 0, 5: 0})


WRITER = """
import os, sys
from tests.io.packed_entries import append, writer_of
folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
from pathlib import Path
with writer_of(Path(folder), shard_bytes=20_000) as writer:
    sys.stdin.read(1)
    for number in range(first, last):
        append(writer, number)
        append(writer, 1000, version=number)
"""


def start(code: str, *arguments: object) -> subprocess.Popen:
    """Run code in another process, with the project importable."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_write_at_once_and_a_third_reads_along(tmp_path):
    writers = [start(WRITER, tmp_path, first, first + 150) for first in (0, 200)]
    store = open_store(tmp_path)
    for writer in writers:
        writer.stdin.write("x")
        writer.stdin.close()
    while any(writer.poll() is None for writer in writers):
        if store.refresh():
            store.save_index()
            newest = len(store) - 1
            assert store.read(newest)["latents"].shape[0] == 4
    assert [writer.wait() for writer in writers] == [0, 0]
    for writer in writers:
        writer.stdout.close()
    store.refresh()
    found = content(store)
    shared = found.pop(id_of(1000))
    assert found == expected(dict.fromkeys([*range(150), *range(200, 350)], 0))
    assert shared in [expected({1000: version})[id_of(1000)] for version in (149, 349)]
    assert len(store) == 600
    store.save_index()
    assert content(open_store(tmp_path)) == {**found, id_of(1000): shared}


def test_a_forked_child_writes_to_a_shard_of_its_own(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom tests.io.packed_entries import append, writer_of\n"
        "writer = writer_of(Path(sys.argv[1]))\nappend(writer, 0)\nchild = os.fork()\n"
        "for number in range(100):\n    append(writer, number + (1 if child else 200))\n"
        "writer.close()\nif child:\n    os.wait()\n"
    )
    process = start(code, tmp_path)
    process.communicate()
    assert process.returncode == 0
    assert len(shards_of(tmp_path)) == 2
    assert content(open_store(tmp_path)) == expected(dict.fromkeys([*range(101), *range(200, 300)], 0))


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from library.io.packed_writer import PackedWriter

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(0)

def write_until_killed(first, told):
    rng = np.random.default_rng(first)
    with PackedWriter(folder, recipe="r", shard_bytes=1 << 20) as writer:
        for number in range(first, first + 10_000):
            body = np.full(int(rng.integers(1, 50_000)), number, np.int32)
            writer.append(number, {"body": body})
            os.write(told, number.to_bytes(8, "little"))
    os._exit(1)

for number in range(rounds):
    children = []
    for which in range(2):
        hear, told = os.pipe()
        child = os.fork()
        if not child:
            write_until_killed(number * 100_000 + which * 10_000, told)
        os.close(told)
        children.append((child, hear))
    for child, hear in children:
        data, wanted = b"", 8 * draw.randint(0, 8)
        while len(data) < wanted and (piece := os.read(hear, wanted - len(data))):
            data += piece
        time.sleep(draw.uniform(0, 0.003))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while piece := os.read(hear, 65536):
            data += piece
        os.close(hear)
        print(len(data) // 8)
"""


def test_killed_writers_lose_at_most_the_record_in_flight(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    rounds = 25
    output, _ = start(KILLER, tmp_path, rounds).communicate()
    stored = [int(line) for line in output.split()]
    assert len(stored) == 2 * rounds
    assert sum(stored) > rounds
    store = PackedStore.open(tmp_path)
    found = set(store.column("id", store.live()).tolist())
    in_flight = 0
    for place, count in enumerate(stored):
        first = place // 2 * 100_000 + place % 2 * 10_000
        there = {number for number in found if first <= number < first + 10_000}
        assert there in ({*range(first, first + count)}, {*range(first, first + count + 1)})
        in_flight += len(there) - count
        found -= there
    assert not found
    assert len(store) == sum(stored) + in_flight
    for position in range(len(store)):
        body = store.read(position)["body"]
        assert (body == store.column("id", np.array([position]))[0]).all()

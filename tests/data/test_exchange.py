"""Caches in memory over two real processes: each rank ends with what the other has encoded."""

import json
from pathlib import Path

from tests.data.variants import NUM, build, write_pictures
from tests.ranks import two_ranks

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_end_with_the_same_text_cache_in_memory(tmp_path):
    folder = write_pictures(tmp_path)
    printed = two_ranks("tests.data.exchange_worker", [str(folder)], tmp_path)
    ranks = [json.loads(text) for text in printed]
    alone, _, _ = build(folder, to_disk=False)
    expected = [alone.get(image, variant=k).pooled_BP[0].tolist() for image in range(NUM) for k in range(3)]
    for first, second in zip(*(rank["passes"] for rank in ranks), strict=True):
        assert first["line"] == second["line"] == f"built {3 * NUM}, reused 0, stale 0, failed 0"
        assert not set(first["encoded"]) & set(second["encoded"]) - {""}
        assert len(first["encoded"]) + len(second["encoded"]) == 3 * NUM + 2
        assert first["rows"] == second["rows"] == expected
    # All exchanges share one group beside that of the GPUs.
    assert [rank["groups"] for rank in ranks] == [["gloo"], ["gloo"]]

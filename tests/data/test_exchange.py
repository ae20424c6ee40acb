"""Caches in memory over two real processes: each rank ends with what the other has encoded."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.data.variants import NUM, build, write_pictures

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_end_with_the_same_text_cache_in_memory(tmp_path):
    folder = write_pictures(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    result = subprocess.run(
        [*launcher, "-m", "tests.data.exchange_worker", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = sorted(map(json.loads, result.stdout.splitlines()), key=lambda rank: rank["rank"])
    alone, _, _ = build(folder, to_disk=False)
    expected = [alone.get(image, variant=k).pooled_BP[0].tolist() for image in range(NUM) for k in range(3)]
    for first, second in zip(*(rank["passes"] for rank in ranks), strict=True):
        assert first["line"] == second["line"] == f"built {3 * NUM}, reused 0, stale 0, failed 0"
        assert not set(first["encoded"]) & set(second["encoded"]) - {""}
        assert len(first["encoded"]) + len(second["encoded"]) == 3 * NUM + 2
        assert first["rows"] == second["rows"] == expected
    # All exchanges share one group beside that of the GPUs.
    assert [rank["groups"] for rank in ranks] == [["gloo"], ["gloo"]]

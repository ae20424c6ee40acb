"""Time of `--help` for every entry point, and whether it loads torch.

python benchmarks/help_time.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def entry_points() -> list[Path]:
    """Every script of the repository's folder and of tools/."""
    found = [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]
    return sorted(path for path in found if "__main__" in path.read_text(encoding="utf-8"))


def seconds(command: list[str]) -> float:
    """Wall time of one process that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def loads_torch(script: Path) -> bool:
    """Whether torch is imported by `script --help`, as the interpreter's import log tells."""
    command = [sys.executable, "-X", "importtime", str(script), "--help"]
    log = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stderr
    return any(line.rsplit("|", 1)[-1].strip() == "torch" for line in log.splitlines())


def main(argv: list[str] | None = None) -> int:
    """Print one line per entry point: median and fastest of the repeats."""
    from benchmarks._machine import machine_class

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args(argv).repeats
    print(f"--help, {repeats} times each, on {machine_class(with_gpu=False)}\n")
    print("| entry point | median s | fastest s | loads torch |\n|---|---|---|---|")
    for script in entry_points():
        times = [seconds([sys.executable, str(script), "--help"]) for _ in range(repeats)]
        name = script.relative_to(ROOT).as_posix()
        torch = "yes" if loads_torch(script) else "no"
        print(f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} | {torch} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())

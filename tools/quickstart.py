#!/usr/bin/env python3
"""Make the project's environment and do its verbs: demo, test, env, check, bench, docs.

    python3 tools/quickstart.py demo            (Windows: py tools\\quickstart.py demo)
    python3 tools/quickstart.py test -k resume  (what follows the verb goes to the tool behind it)

Standard library only, because it runs before anything is installed. Packages go into .venv; a stamp in it records
what was installed, so a second call touches neither pip nor the network. With SDXL_SUITE_PYTHON set, that interpreter
is used as it is and no .venv is made (conda, containers).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "quickstart.json"
RUNTIME = "requirements.txt"
DEVELOPMENT = "requirements-dev.txt"
OLDEST_PYTHON = (3, 11)  # numpy, diffusers and transformers at our pins need it
MOST_WORKERS = 8  # each test worker holds torch and the tiny model, about 1 GB
DEMO_OUT = "demo/out"
DEMO_CONFIG = "demo/lora.toml"
DEMO_PROMPTS = "demo/prompts.txt"
DEMO_LORA = DEMO_OUT + "/lora/zxq.safetensors"
BENCHMARKS = ("help_time", "trainer_overhead")  # the others in that folder take long or need room: by hand
VERBS = {
    "demo": "train a LoRA on a small set of pictures and draw before and after; needs no GPU",
    "test": "run the tests; further arguments go to pytest",
    "env": "make .venv with everything pinned",
    "check": "formatting, lint, types, architecture",
    "bench": "measure the trainer's overhead and start-up times",
    "docs": "write the generated pages from the options",
}


class Failure(Exception):
    """A sentence for the user; ends the program with exit code `code`."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def shown(command: list) -> str:
    """A command as the user can type it in the repository's folder."""
    words = [str(word) for word in command]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def run(step: str, command: list, extra_env: dict[str, str] | None = None) -> None:
    """Run one step in the repository's folder with its output live; Failure names the step and its command."""
    print(f"\n== {step}\n   {shown(command)}", flush=True)
    start = time.monotonic()
    try:
        code = subprocess.call([str(word) for word in command], cwd=str(ROOT), env={**os.environ, **(extra_env or {})})
    except OSError as error:
        raise Failure(f"Step '{step}' could not start: {error}") from error
    if code:
        raise Failure(
            f"Step '{step}' failed (exit code {code}). To run it again, in {ROOT}:\n   {shown(command)}",
            code if code > 0 else 1,
        )
    print(f"   done in {time.monotonic() - start:.1f} s", flush=True)


def require_python(version: tuple) -> None:
    """Refuse an interpreter on which the pinned packages do not install."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        needed, found = (".".join(str(part) for part in numbers) for numbers in (OLDEST_PYTHON, version[:2]))
        raise Failure(
            f"Python {needed} or newer is needed; this is {found}. Use a newer one, for example:\n"
            "   make demo PYTHON=python3.12        (Windows: py -3.12 tools\\quickstart.py demo)"
        )


def python_version() -> str:
    """Such as "3.12": packages are built for it, and a newer patch of it does not matter."""
    return "{}.{}".format(*sys.version_info)


def venv_python() -> Path:
    """Path of .venv's interpreter, whether it is there or not."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def wanted_stamp(files: list[str]) -> dict[str, str]:
    """What .venv should hold: the interpreter's version and the digest of each requirements file."""
    stamp = {"python": python_version()}
    for name in files:
        text = (ROOT / name).read_text(encoding="utf-8").replace("\r\n", "\n")
        stamp[name] = hashlib.sha256(text.encode()).hexdigest()
    return stamp


def read_stamp() -> dict[str, str]:
    """What .venv holds by its stamp; empty without a readable one."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def has_pip(python: Path) -> bool:
    """Whether an interpreter starts and can install, which it cannot after an interrupted creation."""
    try:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.call([str(python), "-m", "pip", "--version"], **quiet) == 0
    except OSError:
        return False


def make_venv(stamp: dict[str, str]) -> None:
    """Create .venv unless a working one for this Python is there; torch may have been put into it beforehand."""
    if Path(sys.prefix).resolve() == VENV.resolve():
        return
    version = python_version()
    if stamp.get("python", version) == version and has_pip(venv_python()):
        return
    try:
        run(f"make .venv with Python {version}", [sys.executable, "-m", "venv", "--clear", VENV])
    except Failure as failure:
        advice = "\nOn Debian and Ubuntu the module is a package of its own: apt-get install python3-venv"
        raise Failure(str(failure) + (advice if sys.platform == "linux" else "")) from failure


def environment(*, development: bool) -> Path | str:
    """The interpreter to work with, after installing into .venv what its stamp lacks."""
    given = os.environ.get("SDXL_SUITE_PYTHON")
    if given:
        return given
    require_python(sys.version_info)
    files = [RUNTIME] + ([DEVELOPMENT] if development else [])
    wanted, there = wanted_stamp(files), read_stamp()
    if venv_python().exists() and all(there.get(key) == value for key, value in wanted.items()):
        return venv_python()
    start = time.monotonic()
    make_venv(there)
    STAMP.unlink(missing_ok=True)  # what an interrupted installation leaves is not what any stamp says
    listed = [word for name in files for word in ("-r", name)]
    install = [venv_python(), "-m", "pip", "install", "--disable-pip-version-check", *listed]
    run("install " + " and ".join(files), install)
    kept = there if there.get("python") == wanted["python"] else {}
    STAMP.write_text(json.dumps({**kept, **wanted}, indent=2), encoding="utf-8")
    print(f"environment ready in {time.monotonic() - start:.0f} s: {VENV}", flush=True)
    return venv_python()


def cores() -> int:
    """Number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def env(arguments: list[str]) -> None:
    """Install everything and say which interpreter has it."""
    print("Python:", environment(development=True))


def test(arguments: list[str]) -> None:
    """Run pytest with one worker per core and one thread each; `arguments` go to pytest."""
    python = environment(development=True)
    workers = str(min(cores(), MOST_WORKERS))
    command = [python, "-m", "pytest", "-n", workers, "--dist", "loadfile", "--no-loadscope-reorder", *arguments]
    run("tests", command, {"OMP_NUM_THREADS": "1"})


def check(arguments: list[str]) -> None:
    """Format, lint and type checks, then the architecture tests; `arguments` go to pytest."""
    python = environment(development=True)
    run("formatting", [python, "-m", "ruff", "format", "--check", "."])
    run("lint", [python, "-m", "ruff", "check", "."])
    run("types of floors 0 to 2", [python, "-m", "mypy"])
    run("architecture", [python, "-m", "pytest", "-q", "tests/arch", *arguments])


def bench(arguments: list[str]) -> None:
    """Run the short benchmarks."""
    if arguments:
        raise Failure("bench takes no further arguments; run a script of benchmarks/ by itself to give it some")
    python = environment(development=False)
    for name in BENCHMARKS:
        run(name, [python, f"benchmarks/{name}.py"])


def docs(arguments: list[str]) -> None:
    """Write the pages that come from the options; `arguments` go to the writer (--check compares only)."""
    run("options and recipes", [environment(development=False), "-m", "library.config.render", *arguments])


def demo_steps(python: Path | str) -> list[tuple[str, list]]:
    """The demo's steps as (name, command), in order; each can be run again by itself."""
    generate = [python, "sdxl_gen_img.py", "--ckpt", "tiny", "--from_file", DEMO_PROMPTS, "--W", "128", "--H", "128"]
    generate += ["--steps", "12", "--scale", "3", "--batch_size", "10", "--sequential_file_name", "--outdir"]
    network = ["--network_module", "networks.lora", "--network_weights", DEMO_LORA]
    launch = [python, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", "1"]
    return [
        ("cache the pictures' latents", [python, "tools/cache_latents.py", "--config_file", DEMO_CONFIG]),
        ("cache the captions", [python, "tools/cache_text_encoder_outputs.py", "--config_file", DEMO_CONFIG]),
        ("draw before training", [*generate, DEMO_OUT + "/before"]),
        ("train the LoRA", [*launch, "sdxl_train_network.py", "--config_file", DEMO_CONFIG]),
        ("draw after training", [*generate, DEMO_OUT + "/after", *network]),
        ("grid and loss curve", [python, "tools/demo_pictures.py"]),
    ]


def demo(arguments: list[str]) -> None:
    """Cache, train, draw with and without the LoRA; every step is a command that users have themselves."""
    if arguments:
        raise Failure("demo takes no further arguments: " + shown(arguments))
    python = environment(development=False)
    shutil.rmtree(str(ROOT / DEMO_OUT), ignore_errors=True)
    start = time.monotonic()
    for step, command in demo_steps(python):
        # The tiny model gains little from more threads, and with one its numbers are the same on every machine.
        run(step, command, {"OMP_NUM_THREADS": "1"})
    print(f"\nThe demo took {time.monotonic() - start:.0f} s (installation apart).")


def main(argv: list[str] | None = None) -> int:
    """Do one verb; 0 when it succeeded, else the exit code of the step that failed."""
    verbs = "\n".join(f"  {name:6} {text}" for name, text in VERBS.items())
    parser = argparse.ArgumentParser(
        description="Make the project's environment and do its verbs.",
        epilog=verbs + "\n\nWhat follows the verb goes to the tool behind it: quickstart.py test -k resume",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=list(VERBS), help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for test, check and docs")
    given = parser.parse_args(argv)
    actions = {"demo": demo, "test": test, "env": env, "check": check, "bench": bench, "docs": docs}
    try:
        actions[given.verb](given.arguments)
    except Failure as failure:
        print(f"\n{failure}", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Two ranks without the start-up of two interpreters: forked from a server that has the heavy libraries imported.

`torchrun` and `accelerate launch` themselves are tested in tests/e2e/test_processes.py.
"""

import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path

PRELOAD = ("library.training.launch", "library.models.assemble", "library.data.latent_caching", "library.data.assemble")


def server() -> multiprocessing.context.ForkServerContext:
    """The context of processes that begin with the libraries imported; a test process has one server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


def two_ranks(module: str, argv: list[str], folder: Path) -> list[str]:
    """What the ranks print while each runs `module.main(argv)` as the launchers would start it; all must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"rank{rank}.txt" for rank in range(2)]
    processes = [
        server().Process(target=_run, args=(module, argv, rank, port, str(output)))
        for rank, output in enumerate(outputs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        process.kill()
    printed = [output.read_text() for output in outputs]
    errors = [Path(f"{output}.err").read_text()[-3000:] for output in outputs]
    assert [process.exitcode for process in processes] == [0, 0], "\n".join(errors)
    return printed


def _run(module: str, argv: list[str], rank: int, port: int, output: str) -> None:
    for number, name in ((1, output), (2, f"{output}.err")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    code = importlib.import_module(module).main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)

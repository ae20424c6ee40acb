"""`--config_from_lora`: from a network file to configuration files, without reading its weights or importing torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from library.config.from_metadata import Rebuilt, rebuild
from library.errors import UserError
from library.io.atomic import write_text
from library.io.safetensors_header import read_header

FLAG = "--config_from_lora"


def asked(words: Sequence[str]) -> bool:
    """Whether the command line asks for it."""
    return any(word == FLAG or word.startswith(FLAG + "=") for word in words)


def run(words: Sequence[str]) -> int:
    """Rebuild the settings of a network; writes them to `--config_file` and `…-dataset.toml` beside it, or prints them.

    Raises UserError for a file that is broken or says nothing, and rather than overwrite a file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(FLAG, required=True, metavar="FILE", dest="lora")
    parser.add_argument("--config_file", metavar="FILE")
    found, rest = parser.parse_known_args(list(words))
    if rest:
        raise UserError(
            f"{rest[0]} cannot stand beside config_from_lora",
            "command line",
            "write the file with --config_file run.toml first; then train with it and any further options",
        )
    metadata, _ = read_header(found.lora)
    target = Path(found.config_file or "run.toml").expanduser()
    target = target if target.suffix == ".toml" else target.with_name(target.name + ".toml")
    dataset = target.with_name(f"{target.stem}-dataset.toml")
    rebuilt = rebuild(metadata, dataset_file=str(dataset), where=str(found.lora))
    if found.config_file is None:
        _show(rebuilt, dataset.name)
        return 0
    for path in (target, dataset) if rebuilt.dataset else (target,):
        if path.exists():
            raise UserError(f"{path} exists already", "--config_file", "name a new file, or remove this one")
    write_text(target, rebuilt.config)
    if rebuilt.dataset is not None:
        write_text(dataset, rebuilt.dataset)
    print(f"written: {target}" + (f" and {dataset}" if rebuilt.dataset else ""))
    for note in rebuilt.notes:
        print(f"note: {note}")
    return 0


def _show(rebuilt: Rebuilt, dataset_name: str) -> None:
    print(rebuilt.config)
    if rebuilt.dataset is not None:
        print(f"# ---- {dataset_name}\n{rebuilt.dataset}")

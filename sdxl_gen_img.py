"""Draw pictures with SDXL: `python sdxl_gen_img.py --ckpt tiny --prompt "a red circle on a blue background"`."""

from __future__ import annotations

import sys

from library.config.cli import parse
from library.errors import entry_point
from library.log import setup_logging

_SHOWN = 20  # names of pictures at the end


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the settings (before torch is imported), draw, print where the pictures are; returns the exit code."""
    cfg = parse("sdxl_gen_img", argv)
    options = cfg.generate
    setup_logging(options.console_log_level or "INFO", options.console_log_file, options.console_log_simple)
    from library.inference.run import run

    paths = run(cfg)
    if not paths:  # asked for prompts, and given none
        print("no pictures")
        return 0
    print(f"{len(paths)} picture{'' if len(paths) == 1 else 's'} in {paths[0].parent.resolve()}:")
    for path in paths[:_SHOWN]:
        print(f"  {path.name}")
    if len(paths) > _SHOWN:
        print(f"  and {len(paths) - _SHOWN} more")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The arguments of prepare_buckets_latents.py, which are sd-scripts', as the settings of a caching run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.cli import make_config
from library.config.run_config import RunConfig
from library.errors import UserError

_SAME_NAME = (
    "train_data_dir",
    "in_json",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_reso_steps",
    "bucket_no_upscale",
    "mixed_precision",
    "flip_aug",
    "max_data_loader_n_workers",
)


@dataclass(frozen=True)
class PrepareRequest:
    """What to prepare: `cfg` is that of a cache_latents run over `cfg.data.in_json`, with its one data set.

    `workers` threads read the image headers (None: as many as suit the machine).
    """

    cfg: RunConfig
    out_json: Path
    full_path: bool = False
    recursive: bool = False
    workers: int | None = None


def read_request(argv: Sequence[str] | None = None) -> PrepareRequest:
    """Read the arguments. Raises UserError with all problems; `--help` ends with SystemExit(0)."""
    args = _parser().parse_args(argv)
    if args.recursive and not args.full_path:
        fix = "add --full_path: images of several folders may have one stem"
        raise UserError("--recursive needs --full_path", where="--recursive", fix=fix)
    values: dict[str, Any] = {name: getattr(args, name) for name in _SAME_NAME}
    cfg = make_config(
        "cache_latents",
        **values,
        pretrained_model_name_or_path=args.model_name_or_path,
        resolution=args.max_resolution,
        enable_bucket=True,
        vae_batch_size=args.batch_size,
        skip_cache_check=args.skip_existing,
        # Refused, or done, like everywhere else.
        v2=args.v2 or None,
        alpha_mask=bool(args.alpha_mask) or None,
    )
    out_json = Path(args.out_json).expanduser()
    if not out_json.parent.is_dir() or out_json.is_dir():
        raise UserError(
            "there can be no such file", where=f"out_json {out_json}", fix="name a file in a folder that is there"
        )
    return PrepareRequest(
        cfg,
        out_json,
        full_path=args.full_path,
        recursive=args.recursive,
        workers=args.max_data_loader_n_workers,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_buckets_latents.py",
        description="Encode the images of a folder, keep the latents in npz files beside them, and write each image's "
        "size and bucket into a metadata file.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("train_data_dir", help="folder of images")
    add("in_json", help="metadata file to read")
    add("out_json", help="metadata file to write: all of in_json, with train_resolution and image_size")
    add("model_name_or_path", help="model with the VAE: checkpoint file, diffusers folder, hub id, or `tiny`")
    add("--batch_size", type=int, default=1, metavar="N", help="images that the VAE encodes at once (1)")
    add("--max_data_loader_n_workers", type=int, metavar="N", help="threads that read the sizes of the images")
    add("--max_resolution", default="512,512", metavar="SIZE", help="area of the buckets as width,height (512,512)")
    add("--min_bucket_reso", type=int, default=256, metavar="N", help="smallest bucket side in pixels (256)")
    add("--max_bucket_reso", type=int, default=1024, metavar="N", help="largest bucket side in pixels (1024)")
    add("--bucket_reso_steps", type=int, default=64, metavar="N", help="bucket sides are multiples of this (64)")
    add("--bucket_no_upscale", action="store_true", help="make buckets from image sizes, never enlarge an image")
    add("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="precision of the VAE (no: float32)")
    add("--full_path", action="store_true", help="name new entries by their path instead of their stem")
    add("--recursive", action="store_true", help="search sub-folders too (needs --full_path)")
    add("--flip_aug", action="store_true", help="keep the latents of the mirror images too")
    add("--alpha_mask", nargs="?", const="1", default="", help="keep the alpha channel as a loss mask")
    skipping = "do not check what existing npz files were made from; plain latents are then not opened"
    add("--skip_existing", action="store_true", help=skipping)
    add("--v2", action="store_true", help=argparse.SUPPRESS)
    return parser

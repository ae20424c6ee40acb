"""The command lines of the LoRA tools, checked as far as that needs no torch. Flags and defaults are sd-scripts'."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from library.config.block_weights import MERGE_SLOTS, parse_block_weights
from library.errors import Problem, UserError
from library.io.safetensors_header import read_header

PRECISIONS = ("float", "fp16", "bf16")
METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")


def parse(name: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the tool `name` (a key of TOOLS). Raises UserError with everything that is wrong at once."""
    description, add, check = TOOLS[name]
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add(parser)
    args = parser.parse_args(argv)
    problems = check(args)
    if problems:
        raise UserError.from_problems(problems)
    return args


def _precision(parser: argparse.ArgumentParser, flag: str, text: str, default: str | None = None) -> None:
    parser.add_argument(flag, choices=PRECISIONS, default=default, help=text)


def _sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", metavar="FILE", default=[], help="LoRA files")
    parser.add_argument("--ratios", nargs="+", type=float, metavar="R", default=[], help="strength of each file")
    parser.add_argument(
        "--lbws",
        nargs="+",
        metavar="LIST",
        default=[],
        help='weights of blocks for each file, as "[1,0,0.5,...]" with 12, 17, 20 or 26 numbers (docs/tools.md)',
    )


def _ranks(parser: argparse.ArgumentParser, *, default: int | None, text: str) -> None:
    parser.add_argument("--new_rank", type=int, default=default, help=text)
    parser.add_argument("--new_conv_rank", type=int, help="rank of 4-D weights (default: new_rank)")


def _output(parser: argparse.ArgumentParser, text: str = "file to write (.safetensors)") -> None:
    parser.add_argument("--save_to", help=text)


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sd_model", help="checkpoint to merge into: file, diffusers folder, hub id (unset: LoRAs only)"
    )
    _sources(parser)
    _output(parser)
    _precision(
        parser, "--precision", "numbers to merge a checkpoint in (float); LoRAs are added up in float32", "float"
    )
    _precision(parser, "--save_precision", "numbers to store (default: those of --precision)")
    _ranks(parser, default=None, text="LoRAs only: approximate the sum by this rank, as svd_merge_lora.py does")
    parser.add_argument("--concat", action="store_true", help="LoRAs only: the exact sum, ranks added up (the default)")
    parser.add_argument("--shuffle", action="store_true", help="LoRAs only: permute the ranks of the result")
    parser.add_argument("--no_metadata", action="store_true", help="leave out which files were merged")


def _check_merge(args: argparse.Namespace) -> list[Problem]:
    problems = [*_check_sources(args), *_check_save_to(args.save_to), *_check_ranks(args)]
    if args.sd_model:
        for flag in ("concat", "shuffle", "new_rank", "new_conv_rank"):
            if getattr(args, flag):
                problems.append(
                    Problem(f"--{flag} is for merging LoRAs with each other", "--sd_model", "leave one out")
                )
    elif args.concat and args.new_rank:
        problems.append(Problem("--concat keeps all ranks, --new_rank does not", "--concat", "leave one out"))
    elif args.new_conv_rank and not args.new_rank:
        problems.append(Problem("--new_conv_rank needs --new_rank", "--new_conv_rank", "add --new_rank N"))
    return problems


def _svd_merge(parser: argparse.ArgumentParser) -> None:
    _sources(parser)
    _output(parser)
    _precision(parser, "--precision", "numbers to store when --save_precision is not given (float)", "float")
    _precision(parser, "--save_precision", "numbers to store (default: those of --precision)")
    _ranks(parser, default=4, text="rank of the result (4)")
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda (cpu)")
    parser.add_argument("--no_metadata", action="store_true", help="leave out which files were merged")


def _check_svd_merge(args: argparse.Namespace) -> list[Problem]:
    return [*_check_sources(args), *_check_save_to(args.save_to), *_check_ranks(args)]


def _extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_org", required=True, help="checkpoint before the tuning: file, folder, hub id")
    parser.add_argument("--model_tuned", required=True, help="checkpoint after the tuning")
    _output(parser)
    parser.add_argument("--dim", type=int, default=4, help="rank (4)")
    parser.add_argument("--conv_dim", type=int, help="rank of 3x3 convolutions; unset, no convolution is extracted")
    _precision(parser, "--load_precision", "round both models to these numbers before they are compared")
    _precision(parser, "--save_precision", "numbers to store (default: float)")
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda (cpu)")
    parser.add_argument("--load_original_model_to", metavar="DEVICE", help="where the original's tensors go first")
    parser.add_argument("--load_tuned_model_to", metavar="DEVICE", help="where the tuned model's tensors go first")
    text = "clamp both factors at this quantile of their values; 1 leaves them exact (0.99)"
    parser.add_argument("--clamp_quantile", type=float, default=0.99, help=text)
    text = "leave the text encoders out unless a weight of theirs changed by more than this (0.01)"
    parser.add_argument("--min_diff", type=float, default=0.01, help=text)
    text = "exact decomposes fully; randomized is much faster and nearly as exact for quickly falling singular values"
    parser.add_argument("--svd", choices=("exact", "randomized"), default="exact", help=text)
    parser.add_argument("--svd_iterations", type=int, default=4, help="power iterations of the randomized method (4)")
    parser.add_argument("--sdxl", action="store_true", help="accepted; every model here is SDXL")
    parser.add_argument("--v2", action="store_true", help="refused: Stable Diffusion 2.x is not SDXL")
    text = "mark the result as one for v-prediction (default: what the tuned model says)"
    parser.add_argument("--v_parameterization", action="store_true", help=text)
    parser.add_argument("--no_metadata", action="store_true", help="leave out which models were compared")


def _check_extract(args: argparse.Namespace) -> list[Problem]:
    problems = _check_save_to(args.save_to)
    if args.v2:
        problems.append(Problem("--v2 is for Stable Diffusion 2.x", "--v2", "leave it out and give SDXL models"))
    problems += _at_least_one(args, "dim", "conv_dim")
    if args.svd_iterations < 0:
        problems.append(Problem(f"svd_iterations is {args.svd_iterations}", "--svd_iterations", "give 0 or more"))
    if not 0 < args.clamp_quantile <= 1:
        problems.append(
            Problem(f"clamp_quantile is {args.clamp_quantile}", "--clamp_quantile", "give more than 0 and at most 1")
        )
    if not args.min_diff >= 0:
        problems.append(Problem(f"min_diff is {args.min_diff}", "--min_diff", "give 0 or more"))
    return problems


def _resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="LoRA file")
    _output(parser)
    _ranks(parser, default=4, text="new rank; with a dynamic method the largest one (4)")
    parser.add_argument("--dynamic_method", choices=METHODS, help="choose every module's rank by its singular values")
    parser.add_argument(
        "--dynamic_param", type=float, help="threshold: a ratio (sv_ratio) or a share of 1 (the others)"
    )
    _precision(parser, "--save_precision", "numbers to store (default: the file's)")
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda (cpu)")
    parser.add_argument("--verbose", action="store_true", help="a line for every module")


def _check_resize(args: argparse.Namespace) -> list[Problem]:
    problems = [*_check_files([args.model], "--model"), *_check_save_to(args.save_to), *_check_ranks(args)]
    param, method = args.dynamic_param, args.dynamic_method
    if method and param is None:
        problems.append(Problem(f"{method} needs --dynamic_param", "--dynamic_param", "give its threshold"))
    elif param is not None and not method:
        problems.append(Problem("--dynamic_param needs --dynamic_method", "--dynamic_param", "give the method too"))
    elif method == "sv_ratio" and not param >= 1:
        problems.append(Problem(f"sv_ratio {param:g} keeps nothing", "--dynamic_param", "give 1 or more, e.g. 20"))
    elif method and method != "sv_ratio" and not 0 < param <= 1:
        problems.append(Problem(f"{method} {param:g} is no share", "--dynamic_param", "give above 0 up to 1, e.g. 0.9"))
    return problems


def _dylora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="DyLoRA file")
    parser.add_argument("--unit", type=int, required=True, help="step of the ranks to extract")
    _output(parser, "name to write; the ranks are added to it (name-0004.safetensors)")
    text = "for files of sd-scripts: store alpha * sqrt(k / rank), the strength that its training has at rank k"
    parser.add_argument("--scale_as_trained", action="store_true", help=text)


def _check_dylora(args: argparse.Namespace) -> list[Problem]:
    return [*_check_files([args.model], "--model"), *_check_save_to(args.save_to), *_at_least_one(args, "unit")]


def _look(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="LoRA file")
    parser.add_argument("-s", "--show_all_keys", action="store_true", help="list every tensor too")
    parser.add_argument("--png", metavar="FILE", help="draw the norms into this picture")


def _check_look(args: argparse.Namespace) -> list[Problem]:
    problems = _check_files([args.file], "file")
    if args.png and not args.png.lower().endswith(".png"):
        problems.append(Problem(f"{args.png} is no name of a PNG file", "--png", "let it end in .png"))
    return problems


def _check_sources(args: argparse.Namespace) -> list[Problem]:
    problems = []
    if not args.models:
        problems.append(Problem("no LoRA is given", "--models", "name one or more files"))
    for flag in ("ratios", "lbws"):
        values = getattr(args, flag)
        if len(values) != len(args.models) and (values or flag == "ratios"):
            what = f"{len(args.models)} models, {len(values)} {flag}"
            problems.append(Problem(what, f"--{flag}", "give one for each of --models"))
    if any(not math.isfinite(ratio) for ratio in args.ratios):
        problems.append(Problem("a ratio is not a finite number", "--ratios", "give numbers such as 0.8"))
    return [*problems, *_check_files(args.models, "--models"), *_check_lbws(args.lbws)]


def _check_lbws(texts: Sequence[str]) -> list[Problem]:
    problems = []
    for text in texts:
        try:
            parse_block_weights(text, MERGE_SLOTS)
        except ValueError as error:
            problems.append(Problem(f"a list of block weights {error}", "--lbws", "write it as docs/tools.md has it"))
    return problems


def _check_files(paths: Sequence[str], flag: str) -> list[Problem]:
    """Problems of files that are not there or, for safetensors, not whole."""
    problems = []
    for path in (Path(path).expanduser() for path in paths):
        if not path.is_file():
            problems.append(Problem(f"there is no file {path}", flag, "check the path"))
        elif path.suffix == ".safetensors":
            try:
                read_header(path)
            except UserError as error:
                problems += error.problems
    return problems


def _check_save_to(path: str | None) -> list[Problem]:
    if not path:
        return [Problem("there is no name for the result", "--save_to", "give a file name ending in .safetensors")]
    if Path(path).is_dir() or not path.endswith(".safetensors"):
        fix = "give a file name ending in .safetensors; pickles (.ckpt, .pt) are read but never written"
        return [Problem(f"{path} is no name of a safetensors file", "--save_to", fix)]
    return []


def _check_ranks(args: argparse.Namespace) -> list[Problem]:
    return _at_least_one(args, "new_rank", "new_conv_rank")


def _at_least_one(args: argparse.Namespace, *names: str) -> list[Problem]:
    found = ((name, getattr(args, name)) for name in names)
    return [
        Problem(f"{name} is {value}", f"--{name}", "give 1 or more")
        for name, value in found
        if value is not None and value < 1
    ]


_Add = Callable[[argparse.ArgumentParser], None]
_Check = Callable[[argparse.Namespace], list[Problem]]
TOOLS: dict[str, tuple[str, _Add, _Check]] = {
    "merge_lora": (
        "Merge LoRAs into a checkpoint (--sd_model), or LoRAs into one LoRA with exactly the sum of their changes.",
        _merge,
        _check_merge,
    ),
    "svd_merge_lora": ("Merge LoRAs into the best LoRA of a given rank.", _svd_merge, _check_svd_merge),
    "extract_lora": ("Extract a LoRA from the difference of two checkpoints.", _extract, _check_extract),
    "resize_lora": ("Give a LoRA another rank, or every module its own.", _resize, _check_resize),
    "extract_lora_from_dylora": ("Take the smaller networks out of a DyLoRA.", _dylora, _check_dylora),
    "check_lora": ("Show how much a LoRA changes in every block, and what is broken.", _look, _check_look),
}

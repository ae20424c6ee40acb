"""What the LoRA tools do with their arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from library.config.block_weights import MERGE_SLOTS, parse_block_weights
from library.errors import UserError
from library.inference.lora_tools import combine, dylora, norms
from library.inference.lora_tools.extract import Extraction
from library.inference.lora_tools.extract import extract as extract_change
from library.inference.lora_tools.merge_model import Source, merge_into_checkpoint
from library.inference.lora_tools.resize import RankRule
from library.inference.lora_tools.resize import resize as resize_file
from library.inference.lora_tools.writing import DTYPES, dtype_of


def merge(args: argparse.Namespace) -> int:
    """tools/merge_lora.py: into a checkpoint, or LoRAs into one."""
    if args.sd_model is None:
        return svd_merge(args)
    merge_into_checkpoint(
        args.sd_model,
        _sources(args),
        args.save_to,
        precision=DTYPES[args.precision],
        save_dtype=dtype_of(args.save_precision),
        with_metadata=not args.no_metadata,
    )
    return 0


def svd_merge(args: argparse.Namespace) -> int:
    """tools/svd_merge_lora.py, and tools/merge_lora.py without a checkpoint."""
    combine.combine(
        _sources(args),
        args.save_to,
        save_dtype=DTYPES[args.save_precision or args.precision],
        new_rank=args.new_rank,
        new_conv_rank=args.new_conv_rank,
        shuffle=getattr(args, "shuffle", False),
        device=_device(getattr(args, "device", "cpu")),
        with_metadata=not args.no_metadata,
    )
    return 0


def extract(args: argparse.Namespace) -> int:
    """tools/extract_lora.py."""
    how = Extraction(
        dim=args.dim,
        conv_dim=args.conv_dim,
        clamp_quantile=args.clamp_quantile,
        min_diff=args.min_diff,
        load_dtype=dtype_of(args.load_precision),
        iterations=args.svd_iterations if args.svd == "randomized" else None,
        device=_device(args.device),
        original_device=_device(args.load_original_model_to or args.device),
        tuned_device=_device(args.load_tuned_model_to or args.device),
    )
    extract_change(
        args.model_org,
        args.model_tuned,
        args.save_to,
        how,
        save_dtype=dtype_of(args.save_precision),
        v_parameterization=args.v_parameterization,
        with_metadata=not args.no_metadata,
    )
    return 0


def resize(args: argparse.Namespace) -> int:
    """tools/resize_lora.py."""
    rule = RankRule(args.new_rank, args.new_conv_rank or args.new_rank, args.dynamic_method, args.dynamic_param or 0.0)
    resize_file(
        args.model,
        args.save_to,
        rule,
        save_dtype=dtype_of(args.save_precision),
        device=_device(args.device),
        verbose=args.verbose,
    )
    return 0


def extract_from_dylora(args: argparse.Namespace) -> int:
    """tools/extract_lora_from_dylora.py."""
    dylora.extract_units(args.model, args.save_to, args.unit, as_trained=args.scale_as_trained)
    return 0


def check(args: argparse.Namespace) -> int:
    """tools/check_lora.py; 1 when something is not finite."""
    found = norms.module_norms(args.file)
    if args.show_all_keys:
        print("\n".join(norms.tensor_lines(args.file)))
    print("\n".join(norms.table(found)))
    if args.png:
        norms.draw(found, args.png, title=f"{Path(args.file).name}: change by block")
    return int(any(one.fault.startswith("NaN") for one in found))


def _device(name: str) -> str:
    """A device's name, after trying it. Raises UserError where this machine does not have it."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device {name} cannot be used ({reason})", "--device", "give cpu, or cuda") from None
    return name


def _sources(args: argparse.Namespace) -> list[Source]:
    texts = args.lbws or [""] * len(args.models)
    blocks = [parse_block_weights(text, MERGE_SLOTS) for text in texts]
    return [Source(*one) for one in zip(args.models, args.ratios, blocks, strict=True)]

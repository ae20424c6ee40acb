"""Make the embedded tiny SDXL from nothing: draw its world, train it, score it, pack it.

    python tools/make_tiny_sdxl.py all --work_dir WORK
    python tools/make_tiny_sdxl.py concept --out demo/dataset/10_zxq

Every stage leaves a file in the work folder and is skipped when it exists; killed training resumes.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "library" / "models" / "tiny" / "weights.safetensors"
STAGES = ("draw", "vae", "latents", "unet", "pack", "score")


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    out = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    out.add_argument("stage", choices=[*STAGES, "all", "concept"])
    out.add_argument("--work_dir", type=Path, default=Path("tiny_work"), help="where the stages leave their files")
    out.add_argument("--vae_steps", type=int, default=3000)
    out.add_argument("--unet_steps", type=int, default=3000)
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--out", type=Path, help="packed weights, or the folder of the concept (both have defaults)")
    out.add_argument("--num_prompts", type=int, default=64, help="prompts of the score")
    return out


def log(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def run_stage(stage: str, args: argparse.Namespace) -> None:
    work, seed = args.work_dir, args.seed
    if stage == "draw":
        from tools.tiny.sheet import world_sheet

        world_sheet(work / "world.png", seed=seed)
    elif stage == "vae" and not (work / "vae.pt").exists():
        from tools.tiny.train_vae import train_vae

        train_vae(work, num_steps=args.vae_steps, seed=seed, log=log)
    elif stage == "latents" and not (work / "latents.pt").exists():
        from tools.tiny.train_unet import make_latents

        make_latents(work, seed=seed, log=log)
    elif stage == "unet" and not (work / "unet.pt").exists():
        from tools.tiny.train_unet import train_unet

        train_unet(work, num_steps=args.unet_steps, seed=seed, log=log)
    elif stage == "pack":
        from tools.tiny.pack import pack_trained

        pack_trained(work, args.out or WEIGHTS, num_prompts=args.num_prompts, log=log)
    elif stage == "score":
        from tools.tiny.pack import score_packed

        score_packed(args.out or WEIGHTS, num_prompts=args.num_prompts, log=log, sheet=work / "captions.png")
    elif stage == "concept":
        from tools.tiny.sheet import write_concept

        write_concept(args.out or ROOT / "demo" / "dataset" / "10_zxq", seed=seed)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.stage != "concept":
        args.work_dir.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        run_stage(stage, args)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())

"""Runs of a training script on four small pictures, and what can be seen of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.config.cli import make_config
from library.config.runs import RUNS
from library.data import dataset
from library.io.safetensors_file import save
from library.models import checkpoint, scratch
from library.training import launch
from library.training.export_check import ExportCheck
from networks import _build, control_net_lllite
from tests.e2e.options.copying import Copier
from tests.e2e.options.rehearsing import model_of_sums

BASE: dict[str, Any] = {
    "resolution": 64,
    "caption_extension": ".txt",
    "train_batch_size": 2,
    "max_train_steps": 1,
    "max_data_loader_n_workers": 0,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "log_every_n_steps": 1,
    "seed": 3,
    "output_name": "net",
}
OF_MODE: dict[str, dict[str, Any]] = {
    "sdxl_train_network": {"network_module": "networks.lora", "network_dim": 2},
    "sdxl_train": {},
    "sdxl_train_textual_inversion": {"token_string": "zxq", "num_vectors_per_token": 2},
    "sdxl_train_control_net_lllite": {
        "train_data_dir": "{folder}/images/1_thing", "conditioning_data_dir": "{folder}/conditions", "cond_emb_dim": 8,
        "network_dim": 4,
    },
}  # fmt: skip
CAN_TRAIN = ("unet", "text_encoder_1", "text_encoder_2")
VOLATILE = re.compile(
    r"time|images_per_second|date|session_id|_at$|hash|_share$|memory|wait|seconds|title|_dirs$|dataset"
)


def furnish(folder: Path) -> None:
    """Everything that an option may name: pictures, captions, metadata, dataset files, models."""
    _pictures(folder)
    _models(folder)
    places = folder / "images" / "1_thing"
    meta = {path.stem: {"caption": f"a circle zxq {index}"} for index, path in enumerate(sorted(places.glob("*.png")))}
    words = {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 48)}
    save(words, folder / "word.safetensors")
    (folder / "tokens.toml").write_text('[tokens.zxq]\ninit_word = "blue"\n')
    (folder / "sentences.txt").write_text("a good {}\n")
    (folder / "meta.json").write_text(json.dumps(meta))
    dataset_file = "[[datasets]]\nresolution = 96\n[[datasets.subsets]]\nimage_dir = {!r}\n"
    (folder / "data.toml").write_text(dataset_file.format(str(places)))
    conditions = f"conditioning_data_dir = {str(folder / 'conditions')!r}\n"
    others = f"[[datasets.subsets]]\nimage_dir = {str(folder / 'others')!r}\nis_reg = true\n"
    (folder / "reg.toml").write_text(dataset_file.format(str(places)) + conditions + others + conditions)
    masks = folder / "masks"
    masks.mkdir()
    for index, path in enumerate(sorted(places.glob("*.png"))):
        mask = np.zeros((*Image.open(path).size[::-1],), dtype=np.uint8)
        mask[: 20 + index] = 255
        Image.fromarray(mask).save(masks / path.name)
    (folder / "masks.toml").write_text(dataset_file.format(str(places)) + f"conditioning_data_dir = {str(masks)!r}\n")
    control = next(iter(sorted((folder / "conditions").glob("*.png"))))
    (folder / "prompts.txt").write_text(f"a red zxq circle --w 64 --h 64 --s 2 --d 1 --cn {control}\n")


def tidy(folder: Path) -> None:
    """Remove what a run left beside the pictures: another would find its latents there."""
    for place in ("images/1_thing", "others", "more/1_square", "regularisation/1_plain"):
        for path in (folder / place).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix == ".npz" or path.name.startswith("."):
                path.unlink()


def _models(folder: Path) -> None:
    bundle = checkpoint.load_bundle("tiny")
    config = {**bundle.unet.config, "transformer_layers_per_block": [1, 1, 1]}
    (folder / "unet.json").write_text(json.dumps(config, default=list))
    narrow = {**config, "block_out_channels": [16, 32, 32], "attention_head_dim": [1, 2, 2]}
    (folder / "narrow.json").write_text(json.dumps(narrow, default=list))
    scratch.new_unet(bundle, folder / "narrow.json", seed=1)
    checkpoint.save_single_file(bundle, folder / "small.safetensors")
    with torch.no_grad():
        bundle.vae.quant_conv.bias += 0.1
        bundle.unet.conv_out.bias += 0.1
    checkpoint.save_single_file(bundle, folder / "other.safetensors")
    vae = {key: value for key, value in load_file(folder / "other.safetensors").items() if "first_stage" in key}
    with safe_open(folder / "other.safetensors", "pt") as file:
        save_file(vae, folder / "vae.safetensors", file.metadata())


def _pictures(folder: Path) -> None:
    """Images of several shapes with alpha, captions of tags and lines, and names that hold faces."""
    target = folder / "images" / "1_thing"
    target.mkdir(parents=True)
    (folder / "regularisation" / "1_plain").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, (w, h) in enumerate([(64, 64), (100, 80), (72, 130), (160, 90)]):
        stem = f"p{index}_{w // 2}_{h // 2}_20_20"
        Image.fromarray(rng.integers(0, 255, (h, w, 4), dtype=np.uint8)).save(target / f"{stem}.png")
        text = (
            f"a {{red|green}} zxq circle, number {index}, (plain:1.5) ;; big, on white, grey\nline {index} zxq, drawn"
        )
        (target / f"{stem}.txt").write_text(text)
        (target / f"{stem}.words").write_text(f"other words of zxq {index}")
        for name in ("conditions", "others"):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(folder / name / f"{stem}.png")
        (folder / "others" / f"{stem}.txt").write_text("a zxq square")
    shutil.copytree(folder / "others", folder / "more" / "1_square")
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        folder / "regularisation" / "1_plain" / "r.png"
    )


@dataclass
class Seen:
    """What a run shows: numbers per step, files, headers, weights, the lines it logged, and where values went."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    headers: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    log: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    loading: dict[str, Any] = field(default_factory=dict)
    vae_batches: list[int] = field(default_factory=list)
    text_batches: list[int] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    trackers: list[str] = field(default_factory=list)
    pictures: str = ""


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(re.sub(r"/\S+|\d\d:\d\d:\d\d", "", record.getMessage()))


@contextlib.contextmanager
def logged(lines: list[str]) -> Iterator[None]:
    """Add what the library logs to `lines`, without places and times."""
    handler, logger = _Lines(lines), logging.getLogger("library")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _every(step: int, find: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Networks of a few modules: what an option does to one it does to all."""
    return lambda *arguments, **options: islice(find(*arguments, **options), 0, None, step)


_BUNDLES: dict[str, Copier] = {}
_HEADERS: dict[tuple[str, str], Any] = {}


def _read_once(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def known(name: str) -> Any:
        key = read.__name__, name
        if key not in _HEADERS:
            _HEADERS[key] = read(name)
        return _HEADERS[key]

    return known


@contextlib.contextmanager
def _spied(seen: Seen, patch: Any, *, rehearsed: bool) -> Iterator[None]:
    """Load each model once, and note how models are loaded and batches are made."""
    parameters: list[torch.Tensor] = []
    load = checkpoint.load_bundle
    bundles: list[Any] = []

    def load_once(name: str, **options: Any) -> Any:
        seen.loading.update(options)
        key = f"{name} {sorted(map(str, options.items()))}"
        if key not in _BUNDLES:
            _BUNDLES[key] = Copier(load(name, **options))
        bundles.append(_BUNDLES[key].copy())
        _watch(bundles[-1], seen)
        return bundles[-1]

    real_loader = dataset.DataLoader

    def loader(*arguments: Any, **options: Any) -> Any:
        seen.loader.update({name: value for name, value in options.items() if isinstance(value, bool | int)})
        return real_loader(*arguments, **options)

    put_together = launch.assemble

    def assemble(*arguments: Any) -> Any:
        trainer, state = put_together(*arguments)
        seen.facts["update"] = type(trainer.update).__name__
        parameters.extend(p for p in trainer.step.parameters() if p.requires_grad)
        return trainer, state

    sums = model_of_sums(patch, parameters) if rehearsed else contextlib.nullcontext()
    with patch.context() as inner, sums:
        inner.setattr(launch, "assemble", assemble)
        # A check of what was saved, which has tests of its own and would take as long as the run.
        inner.setattr(ExportCheck, "__call__", lambda *arguments, **options: None)
        inner.setattr(_build, "default_targets", _every(6, _build.default_targets))
        inner.setattr(control_net_lllite, "targets", _every(5, control_net_lllite.targets))
        inner.setattr(checkpoint, "load_bundle", load_once)
        inner.setattr(checkpoint, "read_stated", _read_once(checkpoint.read_stated))
        inner.setattr(checkpoint, "read_arch", _read_once(checkpoint.read_arch))
        if rehearsed:
            inner.setattr(checkpoint, "save_single_file", _save_without_vocabulary)
        inner.setattr(dataset, "DataLoader", loader)
        with logged(seen.log):
            yield
    vae, unet = bundles[-1].vae, bundles[-1].unet
    seen.facts |= {"use_slicing": vae.use_slicing, "use_tiling": vae.use_tiling}
    seen.facts["gradient_checkpointing"] = unet.down_blocks[0].gradient_checkpointing


def _save_without_vocabulary(bundle: Any, path: Path, *, states: Any = None, **header: Any) -> None:
    """Write what can train of a checkpoint: most of its bytes are the vectors of words, which never do."""
    parts = {part: states[part] if states else getattr(bundle, part).state_dict() for part in CAN_TRAIN}
    tensors = {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}
    save({key: value for key, value in tensors.items() if "token_embedding" not in key}, path, **header)


def _watch(bundle: Any, seen: Seen) -> None:
    if bundle.vae is not None:
        bundle.vae.encoder.register_forward_pre_hook(lambda module, args: seen.vae_batches.append(len(args[0])))
    if bundle.text_encoder_1 is not None:
        bundle.text_encoder_1.register_forward_pre_hook(
            lambda module, args, kwargs: seen.text_batches.append(len((*args, *kwargs.values())[0])), with_kwargs=True
        )


def observe(run: str, folder: Path, patch: Any, name: str, options: dict[str, Any], *, rehearsed: bool = False) -> Seen:
    """Train as `run` with BASE and `options` into `folder/name`; raises UserError where the options are refused.

    rehearsed: with a model of sums in the steps (`rehearsing`), which takes a third of the time.
    """
    cfg, seen = config_of(run, folder, name, options), Seen()
    with _spied(seen, patch, rehearsed=rehearsed), contextlib.redirect_stderr(io.StringIO()):
        launch.train(cfg, trainable_of(run, cfg))
    reset_accelerate()
    seen.log = [*cfg.notices, *seen.log]
    _read(seen, Path(cfg.save.output_dir), cfg.save.output_name or "last")
    return seen


def config_of(run: str, folder: Path, name: str, options: dict[str, Any]) -> Any:
    """The settings of such a run."""
    places = {
        "pretrained_model_name_or_path": str(folder / "small.safetensors"),
        "train_data_dir": str(folder / "images"),
        "output_dir": str(folder / name),
    }
    of_mode = {k: v.replace("{folder}", str(folder)) if isinstance(v, str) else v for k, v in OF_MODE[run].items()}
    values = {**BASE, **places, **of_mode, **options}
    return make_config(run, **{key: value for key, value in values.items() if value is not None})


def trainable_of(run: str, cfg: Any) -> Any:
    """What trains in such a run."""
    from library.training.trainables.full import FullTrainable
    from library.training.trainables.lllite import LlliteTrainable
    from library.training.trainables.networks import network_trainable
    from library.training.trainables.textual_inversion import TextualInversionTrainable

    return {
        "sdxl_train": FullTrainable,
        "sdxl_train_network": network_trainable,
        "sdxl_train_textual_inversion": TextualInversionTrainable,
        "sdxl_train_control_net_lllite": LlliteTrainable,
    }[run](cfg)


def reset_accelerate() -> None:
    """Forget the precision of a process's first run."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def _read(seen: Seen, output: Path, name: str) -> None:
    log = output / f"{name}-log.jsonl"
    for line in log.read_text().splitlines():
        seen.steps.append({key: value for key, value in json.loads(line).items() if not VOLATILE.search(key)})
    paths = sorted(path for path in output.rglob("*") if path.is_file() and "tfevents" not in path.name)
    seen.files = [re.sub(r"\d{14}", "TIME", str(path.relative_to(output))) for path in paths]
    places = [path.parent.relative_to(output) for path in output.rglob("*tfevents*")]
    seen.trackers = [re.sub(r"\d{14}", "TIME", str(place)) for place in places]
    digest = hashlib.sha256()
    for path in (path for path in paths if path.suffix == ".safetensors"):
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            seen.titles.append(header.get("modelspec.title", ""))
            seen.headers[path.name] = {key: value for key, value in header.items() if not VOLATILE.search(key)}
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(key).contiguous()
                digest.update(f"{key} {tensor.dtype}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    seen.weights = digest.hexdigest()
    drawn = [path.read_bytes() for path in paths if path.suffix == ".png"]
    seen.pictures = hashlib.sha256(b"".join(drawn)).hexdigest()


def options_of(run: str) -> list[str]:
    """The names of the options that claim to act in `run`."""
    return [name for name, option in RUNS[run].options().items() if run in option.acts]


Look = Callable[[Seen], Any]


def numbers(seen: Seen) -> Any:
    """Losses, norms, rates and weights: what training is about."""
    return seen.steps, seen.weights


def files(seen: Seen) -> Any:
    """Which files there are."""
    return seen.files


def headers(seen: Seen) -> Any:
    """What the headers of the written files say."""
    return seen.headers


def lines(seen: Seen) -> Any:
    """What was logged."""
    return seen.log

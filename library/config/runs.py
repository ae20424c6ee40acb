"""Which option groups each entry point has."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.admin import AdminOptions
from library.config.clip_vision import ClipVisionOptions
from library.config.control_net import ControlNetOptions
from library.config.data import DataOptions
from library.config.diffusion import DiffusionOptions
from library.config.drawing_speed import DrawingSpeedOptions
from library.config.evaluation import EmaOptions, ValidationOptions
from library.config.fields import Group, Option
from library.config.finetune import FinetuneOptions
from library.config.generate import GenerateOptions
from library.config.img2img import Img2ImgOptions
from library.config.lllite import ConditionOptions, LlliteOptions
from library.config.loop import LoopOptions
from library.config.model import ModelOptions
from library.config.network import NetworkOptions
from library.config.optim import OptimOptions
from library.config.pictures import PictureOptions
from library.config.precision import FrozenOptions, PrecisionOptions
from library.config.preview import PreviewOptions
from library.config.prompter import PrompterOptions
from library.config.regions import RegionOptions
from library.config.report import ReportOptions
from library.config.save import SaveOptions
from library.config.tokens import PivotalOptions, TokenOptions
from library.config.told import ToldOptions
from library.config.unet_effects import UNetEffectOptions


@dataclass(frozen=True)
class Run:
    """An entry point: its script, what it does, its option groups, and its letters in sd_scripts_flags.json."""

    name: str
    script: str
    purpose: str
    groups: dict[str, type[Group]]
    letters: frozenset[str]

    @property
    def is_training(self) -> bool:
        """Whether this run trains; the tools only share the trainer's options."""
        return "loop" in self.groups and self.name not in DATA_TOOLS

    def options(self) -> dict[str, Option]:
        """All options by name, in the order of the groups."""
        return {name: option for group in self.groups.values() for name, option in group.options().items()}

    def group_of(self, name: str) -> str:
        """The group that holds option `name`."""
        return next(key for key, group in self.groups.items() if name in group.options())


DATA_TOOLS = frozenset({"cache_latents", "cache_text_encoder_outputs", "cache_admin", "dataset_report"})

_SHARED: dict[str, type[Group]] = {
    "model": ModelOptions,
    "data": DataOptions,
    "diffusion": DiffusionOptions,
    "optim": OptimOptions,
    "loop": LoopOptions,
    "precision": PrecisionOptions,
    "save": SaveOptions,
    "preview": PreviewOptions,
    "validation": ValidationOptions,
    "ema": EmaOptions,
}
_TOKENS: dict[str, type[Group]] = {**_SHARED, "tokens": TokenOptions}
_NETWORK: dict[str, type[Group]] = {
    **_SHARED,
    "network": NetworkOptions,
    "frozen": FrozenOptions,
    "tokens": TokenOptions,
    "pivotal": PivotalOptions,
}
_FULL: dict[str, type[Group]] = {**_SHARED, "finetune": FinetuneOptions}
_LLLITE: dict[str, type[Group]] = {**_SHARED, "lllite": LlliteOptions}
_TRAINING: dict[str, type[Group]] = {**_NETWORK, **_FULL, "lllite": ConditionOptions}

_DRAWING: dict[str, type[Group]] = {
    "generate": GenerateOptions,
    "control_net": ControlNetOptions,
    "img2img": Img2ImgOptions,
    "drawing_speed": DrawingSpeedOptions,
    "unet_effects": UNetEffectOptions,
    "pictures": PictureOptions,
    "regions": RegionOptions,
    "told": ToldOptions,
    "clip_vision": ClipVisionOptions,
    "prompter": PrompterOptions,
}

# The tools accept the trainers' options because users give them a trainer's TOML file; the `acts` of each
# option says which of them have an effect there.
RUNS: dict[str, Run] = {
    run.name: run
    for run in (
        Run("sdxl_train_network", "sdxl_train_network.py", "Train a LoRA.", _NETWORK, frozenset("N")),
        Run("sdxl_train", "sdxl_train.py", "Fine-tune the whole model.", _FULL, frozenset("T")),
        Run(
            "sdxl_train_textual_inversion",
            "sdxl_train_textual_inversion.py",
            "Train new words of the prompt (textual inversion).",
            _TOKENS,
            frozenset("I"),
        ),
        Run(
            "sdxl_train_control_net_lllite",
            "sdxl_train_control_net_lllite.py",
            "Train a ControlNet-LLLite: a small network that makes pictures follow a control image.",
            _LLLITE,
            frozenset("L"),
        ),
        Run(
            "cache_latents",
            "tools/cache_latents.py",
            "Encode all images of a dataset once and keep the latents on disk.",
            _TRAINING,
            frozenset({"cl", "N", "T"}),
        ),
        Run(
            "cache_text_encoder_outputs",
            "tools/cache_text_encoder_outputs.py",
            "Encode all captions of a dataset once and keep the result on disk.",
            _TRAINING,
            frozenset({"ct", "N", "T"}),
        ),
        Run(
            "cache_admin",
            "tools/cache_admin.py",
            "Look after the caches of a dataset: status, verify, pack, unpack or clean.",
            {"admin": AdminOptions, **_TRAINING},
            frozenset("NT"),
        ),
        Run(
            "dataset_report",
            "tools/dataset_report.py",
            "Show what a run would train on: buckets, crops, captions, problems.",
            {"report": ReportOptions, **_TRAINING},
            frozenset({"N", "T"}),
        ),
        Run(
            "sdxl_gen_img",
            "sdxl_gen_img.py",
            "Draw pictures from prompts.",
            _DRAWING,
            frozenset("Gg"),
        ),
    )
}

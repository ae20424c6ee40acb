"""The validated options of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.config.fields import Group

if TYPE_CHECKING:
    from library.config.admin import AdminOptions
    from library.config.clip_vision import ClipVisionOptions
    from library.config.control_net import ControlNetOptions
    from library.config.data import DataOptions
    from library.config.diffusion import DiffusionOptions
    from library.config.drawing_speed import DrawingSpeedOptions
    from library.config.evaluation import EmaOptions, ValidationOptions
    from library.config.finetune import FinetuneOptions
    from library.config.generate import GenerateOptions
    from library.config.img2img import Img2ImgOptions
    from library.config.lllite import LlliteOptions
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

DEFAULT = "default"

# Options whose values are never printed, written or sent.
SECRETS = frozenset({"wandb_api_key"})


class RunConfig:
    """Option groups as attributes (`cfg.optim.learning_rate`), and where every value came from.

    `provenance`: option -> "command line", "run.toml line 12", "default", or what it was implied by.
    `notices`: sentences about settings that were changed or have no effect, for the log.
    """

    model: ModelOptions
    data: DataOptions
    diffusion: DiffusionOptions
    optim: OptimOptions
    network: NetworkOptions
    finetune: FinetuneOptions
    lllite: LlliteOptions
    loop: LoopOptions
    precision: PrecisionOptions
    frozen: FrozenOptions
    tokens: TokenOptions
    pivotal: PivotalOptions
    save: SaveOptions
    preview: PreviewOptions
    validation: ValidationOptions
    ema: EmaOptions
    drawing_speed: DrawingSpeedOptions
    generate: GenerateOptions
    control_net: ControlNetOptions
    img2img: Img2ImgOptions
    told: ToldOptions
    clip_vision: ClipVisionOptions
    prompter: PrompterOptions
    regions: RegionOptions
    unet_effects: UNetEffectOptions
    pictures: PictureOptions
    admin: AdminOptions
    report: ReportOptions

    def __init__(
        self, run: str, *, groups: Mapping[str, Group], provenance: Mapping[str, str], notices: list[str]
    ) -> None:
        self.run = run
        self.groups = dict(groups)
        self.provenance = dict(provenance)
        self.notices = notices
        self.__dict__.update(self.groups)

    def flat(self) -> dict[str, Any]:
        """Every option by name."""
        return {name: getattr(group, name) for group in self.groups.values() for name in type(group).options()}

    def get(self, name: str) -> Any:
        """The value of one option, whichever group holds it."""
        return next(getattr(group, name) for group in self.groups.values() if name in type(group).options())

    def is_given(self, name: str) -> bool:
        """Whether the user (or something the user asked for) set this option."""
        return self.provenance.get(name, DEFAULT) != DEFAULT

    def __repr__(self) -> str:
        known = {name: value for name, value in self.flat().items() if name not in SECRETS}
        given = ", ".join(f"{name}={value!r}" for name, value in known.items() if self.is_given(name))
        return f"RunConfig({self.run!r}, {given})"

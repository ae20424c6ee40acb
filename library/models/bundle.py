"""A loaded model: the four parts, the tokenizer, and what has to be known about them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from library.diffusion.schedule import NoiseSchedule
from library.diffusion.targets import PredictionType
from library.models.arch import LATENT_FACTOR, Part, SdxlArch
from library.models.configs import SCALING_FACTOR
from library.models.prediction import Stated, schedule_for
from library.models.tokenizers import ClipTokenizer
from library.sizes import Size

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection


@dataclass
class ModelBundle:
    """SDXL in memory; parts that were not loaded are None.

    source is the path or name as the user gave it, resolved_path the file or folder it stands for. identify gives
    the identity of a part's stored weights, loaded or not. logit_scale is the one tensor of a single file that no
    part uses; it is kept for writing back. stated is what the checkpoint says about its prediction type and schedule;
    prediction_type and schedule are those in force: the stated ones, or epsilon on SDXL's schedule.
    """

    unet: "UNet2DConditionModel"
    text_encoder_1: "CLIPTextModel"
    text_encoder_2: "CLIPTextModelWithProjection"
    vae: "AutoencoderKL"
    tokenizer: ClipTokenizer
    arch: SdxlArch
    source: str
    resolved_path: Path
    identify: Callable[[Part], str] = field(repr=False)
    stated: Stated = field(default_factory=Stated)
    prediction_type: PredictionType = "epsilon"
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule.scaled_linear)
    metadata: dict[str, str] = field(default_factory=dict)
    logit_scale: Tensor | None = None
    scaling_factor: float = SCALING_FACTOR

    def set_prediction(
        self, prediction_type: PredictionType, *, zero_terminal_snr: bool = False, flow_shift: float | None = None
    ) -> None:
        """Take the model for one of this prediction type, on the schedule that goes with it."""
        self.schedule = schedule_for(prediction_type, zero_terminal_snr=zero_terminal_snr, flow_shift=flow_shift)
        self.prediction_type = prediction_type

    @property
    def text_widths(self) -> tuple[int, int]:
        """Widths of the two encoders' hidden states: (768, 1280) in SDXL."""
        return self.arch.text_widths

    @property
    def native_size(self) -> Size:
        """The size in pixels that the model was made for: 1024 x 1024 for SDXL, 128 x 128 for `tiny`."""
        side = self.arch.facts.sample_size * LATENT_FACTOR
        return Size(side, side)

    def vae_id(self) -> str:
        """Short hex identity of the VAE's stored weights: equal for equal weights, whatever file they are in."""
        return self.identify("vae")

    def text_encoder_id(self) -> str:
        """Short hex identity of both text encoders' stored weights."""
        return self.identify("text_encoder_1") + self.identify("text_encoder_2")

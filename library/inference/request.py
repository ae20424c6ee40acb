"""One picture to make: what, how large, how. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from library.inference.effects import NO_GROWTH, NO_SHRINKING, DeepShrink, GradualLatent
from library.sizes import Size

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = 8  # pixels per latent cell, each way
SMALLEST_SIDE = 64
MAX_STEPS = 1000
NATIVE_SIZE = Size(1024, 1024)  # what SDXL was trained at
OPEN = 0  # a side that nothing has said yet: it becomes the size that the model was made for
MAX_SIDE = 2**15
MAX_SEED = 2**31 - 1  # of the seeds that a run draws
SEED_END = 2**63  # given ones are below
AND = " AND "  # between the sub-prompts of one picture
STRENGTH = 0.8  # of drawing over a picture


class Upscaler(Protocol):
    """What an upscaler module's `create_upscaler(**arguments)` returns."""

    def support_latents(self) -> bool:
        """Whether it enlarges latents; else it is given pictures."""
        ...

    def upscale(
        self, vae: Any, lowreso_images: Any, lowreso_latents: Any, dtype: Any, width: int, height: int,
        batch_size: int = 1, vae_batch_size: int = 1,
    ) -> Any:  # fmt: skip
        """Pictures (a list of PIL's) or scaled latents (B, 4, h, w) of width x height pixels."""
        ...


@dataclass(frozen=True)
class HighresFix:
    """Drawing a smaller picture first, `scale` times as large, in `steps` steps.

    strength: with which it is drawn over the request's image, where there is one; None: with the request's. It is
    enlarged as a picture, as latents, or by the upscaler. without_control: no control image acts on the whole picture.
    save_first: the smaller picture is a result too.
    """

    scale: float
    steps: int = 28
    strength: float | None = None
    latents: bool = False
    upscaler: Upscaler | None = None
    without_control: bool = False
    save_first: bool = False


@dataclass(frozen=True)
class GenRequest:
    """One picture: what, how large, how.

    seed None: a random one. eta None: the sampler's own. negative_scale None: plain guidance (guidance.Guidance).
    original_*, crop_* are the size ids that the model is told, None meaning the output size and 0; original_*_negative
    those of the negative branch, None meaning the positive branch's. network_muls: the strengths of the networks, None
    meaning as loaded. control: paths of the control images. seeds: what `--d` gave for the pictures of this prompt.
    image: the picture that is drawn over, and mask: where (white is drawn anew; None: everywhere), paths or pictures;
    strength: the share of the steps that is done then, None meaning 0.8. highres: how the picture is drawn in two
    sizes, None: in one; stage: "0" for the smaller picture and "1" for the whole one, then. deep_shrink and
    gradual_latent: off unless they say otherwise. clip_prompt is only written into the picture's file; name is that
    file's, perhaps without its ending. raw: the whole line, its choices made. number: of the picture in a run, from 0.
    batch: requests with different numbers of a batch are not drawn at once.
    """

    prompt: str = ""
    negative: str = ""
    size: Size = NATIVE_SIZE
    steps: int = 50
    scale: float = 7.5
    seed: int | None = None
    sampler: str = "ddim"
    eta: float | None = None
    negative_scale: float | None = None
    guidance_rescale: float = 0.0
    original_width: int | None = None
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None
    network_muls: tuple[float, ...] | None = None
    control: tuple[str, ...] = ()
    image: str | Image | None = None
    mask: str | Image | None = None
    strength: float | None = None
    highres: HighresFix | None = None
    stage: str = ""
    deep_shrink: DeepShrink = NO_SHRINKING
    gradual_latent: GradualLatent = NO_GROWTH
    seeds: tuple[int, ...] = ()
    clip_prompt: str = ""
    name: str = ""
    raw: str = ""
    number: int | None = None
    batch: int | None = None

    def settings(self) -> GenRequest:
        """What has to be equal for pictures to be drawn in one batch; all else is left out."""
        return replace(
            self, prompt="", negative="", seed=None, seeds=(), control=(), image=None, mask=None, clip_prompt="",
            name="", raw="", stage="", number=None,
        )  # fmt: skip

    @property
    def steps_over(self) -> int:
        """How many of the steps are done over a picture, at the request's strength: 0 to `steps`."""
        return min(int(self.steps * (STRENGTH if self.strength is None else self.strength)), self.steps)

    def size_ids(self, *, negative: bool = False) -> tuple[int, int, int, int, int, int]:
        """(original h, original w, crop top, crop left, target h, target w) of one branch."""
        original_w, original_h = self.original_width or self.size.w, self.original_height or self.size.h
        if negative:
            original_w = self.original_width_negative or original_w
            original_h = self.original_height_negative or original_h
        return (original_h, original_w, self.crop_top or 0, self.crop_left or 0, self.size.h, self.size.w)


def split_and(prompt: str) -> list[str]:
    """The sub-prompts of a prompt, which " AND " separates; at least one."""
    return prompt.split(AND)


def with_open_sides(request: GenRequest, size: Size) -> GenRequest:
    """The request with `size` on the sides that are open."""
    return replace(request, size=Size(request.size.w or size.w, request.size.h or size.h))

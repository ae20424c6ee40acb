"""What an SDXL-shaped model is made of: read from tensor shapes, plus the few facts that shapes cannot tell.

The full SDXL and the embedded tiny one go through the same code. Shapes give every width, depth and count; the
number of GroupNorm groups, the channels per attention head and the usual picture size come from the file's header
metadata (`arch.*`) and are SDXL's own when the header says nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from library.errors import UserError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Part = Literal["unet", "text_encoder_1", "text_encoder_2", "vae"]
PARTS: tuple[Part, ...] = ("unet", "text_encoder_1", "text_encoder_2", "vae")  # in the order of the single file
PREFIXES: dict[Part, str] = {
    "unet": "model.diffusion_model.",
    "text_encoder_1": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
PART_NAMES: dict[Part, str] = {
    "unet": "U-Net",
    "text_encoder_1": "text encoder 1",
    "text_encoder_2": "text encoder 2",
    "vae": "VAE",
}
LATENT_FACTOR = 8  # pixels per latent cell, each way
NUM_RES_BLOCKS = 2


@dataclass(frozen=True)
class Facts:
    """What shapes cannot tell; the defaults are SDXL's.

    norm_groups and vae_norm_groups count GroupNorm groups, head_dim is channels per attention head in the U-Net and
    both text encoders, sample_size the usual height and width of the latents.
    """

    norm_groups: int = 32
    vae_norm_groups: int = 32
    head_dim: int = 64
    sample_size: int = 128


@dataclass(frozen=True)
class UnetArch:
    """channels and depths (transformer blocks per attention) go from the finest level to the coarsest."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    context_width: int
    size_vector_width: int


@dataclass(frozen=True)
class TextArch:
    """projection is the width of the pooled vector, None for an encoder without one."""

    vocab_size: int
    num_positions: int
    width: int
    num_layers: int
    feed_forward: int
    projection: int | None


@dataclass(frozen=True)
class VaeArch:
    """channels go from the image to the latents."""

    in_channels: int
    latent_channels: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class SdxlArch:
    """All four parts; a part is None when the model files do not have it."""

    unet: UnetArch | None
    text_encoder_1: TextArch | None
    text_encoder_2: TextArch | None
    vae: VaeArch | None
    facts: Facts = Facts()

    @property
    def text_widths(self) -> tuple[int, int]:
        """Widths of the two encoders' hidden states: (768, 1280) in SDXL; both encoders must be there."""
        assert self.text_encoder_1 is not None and self.text_encoder_2 is not None
        return self.text_encoder_1.width, self.text_encoder_2.width


SDXL = SdxlArch(
    unet=UnetArch(4, 4, (320, 640, 1280), (0, 2, 10), 2048, 2816),
    text_encoder_1=TextArch(49408, 77, 768, 12, 3072, None),
    text_encoder_2=TextArch(49408, 77, 1280, 32, 5120, 1280),
    vae=VaeArch(3, 4, (128, 256, 512, 512)),
)
_FACT_KEYS = {
    "norm_groups": "arch.norm_groups",
    "vae_norm_groups": "arch.vae_norm_groups",
    "head_dim": "arch.head_dim",
    "sample_size": "arch.sample_size",
}


def arch_from_tensors(shapes: Shapes, metadata: Mapping[str, str], *, where: str = "") -> SdxlArch:
    """The architecture of a single-file checkpoint, from its tensors' shapes and its header metadata.

    `shapes` maps single-file keys to shapes. A part none of whose tensors is there is None. Raises UserError when a
    part is there but not of SDXL's kind, or when `metadata` does not hold the facts that these widths need.
    """

    def part(name: Part) -> dict[str, Shape]:
        prefix = PREFIXES[name]
        return {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}

    try:
        arch = SdxlArch(
            unet=_unet(part("unet")),
            text_encoder_1=_clip_l(part("text_encoder_1")),
            text_encoder_2=_big_g(part("text_encoder_2")),
            vae=vae_from_tensors(part("vae")),
            facts=facts_from_metadata(metadata, where=where),
        )
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"the tensors do not have the structure of an SDXL model (looked for {error})",
            where=where,
            fix="give an SDXL checkpoint",
        ) from None
    check_facts(arch, where=where)
    return arch


def facts_from_metadata(metadata: Mapping[str, str], *, where: str = "") -> Facts:
    """The `arch.*` facts of a file's header metadata; UserError when one is not a positive whole number."""
    found = {}
    for name, key in _FACT_KEYS.items():
        text = metadata.get(key)
        if text is None:
            continue
        if not text.isdecimal() or int(text) == 0:
            raise UserError(f"header metadata {key} is {text!r}, not a positive whole number", where=where)
        found[name] = int(text)
    return replace(Facts(), **found)


def facts_metadata(facts: Facts) -> dict[str, str]:
    """Header metadata for the facts that are not SDXL's defaults; empty for a full SDXL."""
    default = Facts()
    return {
        key: str(getattr(facts, name))
        for name, key in _FACT_KEYS.items()
        if getattr(facts, name) != getattr(default, name)
    }


def check_facts(arch: SdxlArch, *, where: str = "") -> None:
    """UserError when the widths cannot be divided into the heads and groups that the facts name."""
    facts = arch.facts
    heads = list(arch.unet.channels) if arch.unet else []
    heads += [text.width for text in (arch.text_encoder_1, arch.text_encoder_2) if text]
    groups = arch.unet.channels if arch.unet else ()
    vae_groups = arch.vae.channels if arch.vae else ()
    if (
        any(width % facts.head_dim for width in heads)
        or any(width % facts.norm_groups for width in groups)
        or any(width % facts.vae_norm_groups for width in vae_groups)
    ):
        raise UserError(
            f"widths {sorted({*heads, *vae_groups})} do not divide into {facts.head_dim} channels per head and "
            f"{facts.norm_groups} (VAE {facts.vae_norm_groups}) normalisation groups",
            where=where,
            fix="this is not a full SDXL, and the header metadata that says how it differs (arch.head_dim, "
            "arch.norm_groups, arch.vae_norm_groups) is missing: another program has probably dropped it; "
            "use the original file",
        )


def vae_from_tensors(shapes: Shapes) -> VaeArch | None:
    """The VAE's architecture from LDM keys without prefix, None when there are none."""
    if not shapes:
        return None
    num_levels = _count(shapes, r"decoder\.up\.(\d+)\.")
    return VaeArch(
        in_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=shapes["post_quant_conv.weight"][0],
        channels=tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(num_levels)),
    )


def _unet(shapes: Shapes) -> UnetArch | None:
    if not shapes:
        return None
    # Three places per level on either side; the larger count, so that a file that was cut short keeps its levels.
    places = max(_count(shapes, r"input_blocks\.(\d+)\."), _count(shapes, r"output_blocks\.(\d+)\."))
    firsts = [1 + 3 * level for level in range(-(-places // 3))]  # the first resnet of each level
    depths = tuple(_count(shapes, rf"input_blocks\.{first}\.1\.transformer_blocks\.(\d+)\.") for first in firsts)
    widths = [shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")]
    return UnetArch(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        channels=tuple(shapes[f"input_blocks.{first}.0.in_layers.2.weight"][0] for first in firsts),
        depths=depths,
        context_width=widths[0],
        size_vector_width=shapes["label_emb.0.0.weight"][1],
    )


def _clip_l(shapes: Shapes) -> TextArch | None:
    if not shapes:
        return None
    vocab_size, width = shapes["text_model.embeddings.token_embedding.weight"]
    return TextArch(
        vocab_size=vocab_size,
        num_positions=shapes["text_model.embeddings.position_embedding.weight"][0],
        width=width,
        num_layers=_count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        feed_forward=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        projection=None,
    )


def _big_g(shapes: Shapes) -> TextArch | None:
    if not shapes:
        return None
    vocab_size, width = shapes["token_embedding.weight"]
    # Playground's files hold it as a linear layer's weight, the other way round.
    projection = shapes["text_projection"][1] if "text_projection" in shapes else shapes["text_projection.weight"][0]
    return TextArch(
        vocab_size=vocab_size,
        num_positions=shapes["positional_embedding"][0],
        width=width,
        num_layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
        feed_forward=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        projection=projection,
    )


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that `pattern` finds at the start of a key; 0 when it finds none."""
    compiled = re.compile(pattern)
    return max((int(match[1]) + 1 for key in shapes if (match := compiled.match(key))), default=0)

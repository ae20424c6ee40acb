"""Load and save SDXL: a single file, a diffusers folder, a hub id, or the name `tiny`."""

import difflib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.errors import UserError
from library.io.hashing import tensors_identity
from library.io.safetensors_file import save
from library.models import diffusers_folder, embedded, hub, identify, prediction
from library.models.arch import PART_NAMES, PARTS, PREFIXES, Part, SdxlArch, check_facts, facts_metadata
from library.models.assemble import empty_module, filled, part_keymap
from library.models.bundle import ModelBundle
from library.models.opened import LOGIT_SCALE, OpenedModel, OpenedVae, open_model, open_vae
from library.models.prediction import Stated
from library.models.tensors import joined
from library.models.tokenizers import load_tokenizer

ALL_PARTS = ("unet", "text_encoders", "vae")
_HALF = (torch.float16, torch.bfloat16)
_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def resolve_checkpoint(name: str, *, parts: Iterable[str] = ALL_PARTS, half: bool = False) -> Path:
    """The local file or folder that `name` stands for; no weights are read.

    `name` is a path, a hub id (downloaded unless it is in the hub's cache; `half` prefers its fp16 files), or `tiny`
    (written on first use). Raises UserError when there is no such thing.
    """
    if name == embedded.NAME:
        return embedded.materialised_tiny()
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        if not (path / "model_index.json").is_file() and not (path / "unet").is_dir():
            raise UserError("this folder is not a diffusers model", where=name, fix=_folder_hint(path))
        return path.resolve()
    if hub.looks_like_id(name):
        return hub.download_model(name, parts=_chosen(parts), half=half)
    raise UserError("there is no such checkpoint", where=name, fix=_similar_hint(path))


def load_bundle(
    name_or_path: str,
    *,
    vae: str | None = None,
    dtype: torch.dtype = torch.float32,
    dtypes: Mapping[Part, torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    parts: Iterable[str] = ALL_PARTS,
    disable_mmap: bool = False,
) -> ModelBundle:
    """Load SDXL from a single file, a diffusers folder, a hub id or `tiny`; parameters come frozen, in eval mode.

    `vae` replaces the VAE: a folder, a hub id or a file. Tensors are cast to `dtype`, those of a part in `dtypes` to
    its own, one at a time. `parts` out of "unet", "text_encoders", "vae": the others are not read and are None in the
    bundle. `disable_mmap` reads the bytes instead of mapping the file. Raises UserError for files that are missing,
    broken, not SDXL, or lack tensors.
    """
    chosen, half = _chosen(parts), dtype in _HALF
    path = resolve_checkpoint(name_or_path, parts=parts, half=half)
    vae_path = _resolve_vae(vae, half=half) if vae else None

    def opened(stack: ExitStack) -> _Sources:
        return _Sources(path, vae_path, half=half, mmap=not disable_mmap, stack=stack, names=(name_or_path, vae or ""))

    modules: dict[Part, nn.Module | None] = dict.fromkeys(PARTS)
    with ExitStack() as stack:
        sources = opened(stack)
        sources.require(chosen)
        for part in chosen:
            module, tensors, where = sources.part(part)
            target = (dtypes or {}).get(part, dtype)
            modules[part] = filled(module, tensors, device=device, dtype=target, where=where)
        model = sources.model
        found: dict[str, Any] = {"metadata": model.metadata, "stated": model.stated}
        found |= {"arch": sources.arch, "logit_scale": model.logit_scale()}

    @cache
    def identify_part(part: Part) -> str:
        with ExitStack() as stack:
            return tensors_identity(opened(stack).part(part)[1])

    bundle = ModelBundle(
        **modules,  # type: ignore[arg-type]  # parts that were not asked for are None, as the docstring says
        tokenizer=load_tokenizer(),
        source=name_or_path,
        resolved_path=path,
        identify=identify_part,
        **found,
    )
    stated = bundle.stated
    bundle.set_prediction(
        stated.prediction_type or "epsilon",
        zero_terminal_snr=stated.zero_terminal_snr and stated.prediction_type != "rectified_flow",
        flow_shift=stated.flow_shift,
    )
    return bundle


def read_stated(name: str) -> Stated | None:
    """What a checkpoint says about its prediction type, from its header alone; None where that is not possible.

    Not possible are hub models that are not here yet, and PyTorch files, which would have to be read whole. Raises
    UserError for what is no SDXL checkpoint at all.
    """
    with ExitStack() as stack:
        model = _peeked(name, stack)
        return None if model is None else model.stated


def read_arch(name: str) -> SdxlArch | None:
    """What a checkpoint is made of, from its header alone; None where `read_stated` is None.

    Raises UserError for what is no SDXL checkpoint or lacks its U-Net or a text encoder. A VAE may come from elsewhere.
    """
    with ExitStack() as stack:
        model = _peeked(name, stack)
        if model is None:
            return None
        identify.require_parts(model.arch, _chosen(("unet", "text_encoders")), where=name)
        return model.arch


def _peeked(name: str, stack: ExitStack) -> OpenedModel | None:
    """The model, open, where opening it reads no more than headers and configurations."""
    if not Path(name).expanduser().exists() and name != embedded.NAME and hub.looks_like_id(name):
        return None
    path = resolve_checkpoint(name)
    if path.is_file() and path.suffix != ".safetensors":
        return None
    return open_model(path, half=False, mmap=True, stack=stack, where=name)


def save_single_file(
    bundle: ModelBundle,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    states: Mapping[Part, Mapping[str, torch.Tensor]] | None = None,
) -> None:
    """Write all four parts as one safetensors file in sd-scripts' layout, atomically, tensor by tensor.

    Floating-point tensors are cast to `dtype`, or kept as they are. The header gets `metadata`, what tells this
    architecture from SDXL's, and the prediction type, which empty marker tensors tell too. Nothing is held twice:
    renaming and casting happen as the bytes are written. `states` are the parts' tensors where the bundle's modules
    are empty.
    """
    _require_whole(bundle, str(path))
    views: list[tuple[str, Mapping[str, torch.Tensor]]] = []
    for part in PARTS:
        state = states[part] if states else getattr(bundle, part).state_dict()
        views.append((PREFIXES[part], part_keymap(bundle.arch, part).view(state, reverse=True)))
        if part == "text_encoder_2" and bundle.logit_scale is not None:
            views.append((PREFIXES[part], {LOGIT_SCALE: bundle.logit_scale}))
    views.append(("", prediction.markers_of(bundle.prediction_type, bundle.schedule)))
    header = {"format": "pt", **facts_metadata(bundle.arch.facts)}
    said = prediction.header_of(bundle.prediction_type, bundle.schedule)
    save(joined(views), path, header | dict(metadata or {}) | said, dtype=dtype, checked=True)


def save_diffusers(bundle: ModelBundle, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write all four parts, tokenizers and scheduler settings as a folder for StableDiffusionXLPipeline, atomically.

    Floating-point tensors are cast to `dtype`, or kept as they are.
    """
    _require_whole(bundle, str(folder))
    diffusers_folder.write_folder(bundle, Path(folder), dtype=dtype)


class _Sources:
    """The model's files and, when it is replaced, the VAE's: one place to ask for any part."""

    def __init__(
        self, path: Path, vae_path: Path | None, *, half: bool, mmap: bool, stack: ExitStack, names: tuple[str, str]
    ) -> None:
        self._where = names[0] if names[0] == embedded.NAME else str(path)
        self._vae_where = str(vae_path)
        self.model: OpenedModel = open_model(path, half=half, mmap=mmap, stack=stack, where=self._where)
        self.arch: SdxlArch = self.model.arch
        self.vae: OpenedVae | None = None
        if vae_path is not None:
            self.vae = open_vae(vae_path, base=self.arch, half=half, mmap=mmap, stack=stack, where=self._vae_where)
            self.arch = self.vae.arch
            check_facts(self.arch, where=self._vae_where)

    def require(self, parts: Iterable[Part]) -> None:
        """UserError when one of `parts` is not there or the parts do not go together."""
        identify.require_parts(self.arch, parts, where=self._where)

    def part(self, part: Part) -> tuple[nn.Module, Mapping[str, torch.Tensor], str]:
        """An empty module of the part, the tensors for it, and the name of the file they come from."""
        module = empty_module(self.arch, part)
        if part == "vae" and self.vae is not None:
            return module, self.vae.tensors(module), self._vae_where
        return module, self.model.tensors(part, module), self._where


def _resolve_vae(name: str, *, half: bool) -> Path:
    if name == embedded.NAME:
        return embedded.materialised_tiny()
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "vae" / "config.json").is_file():
            raise UserError("there is no VAE in this folder", where=name, fix="give a folder with its config.json")
        return path.resolve()
    if hub.looks_like_id(name):
        return hub.download_vae(name, half=half)
    raise UserError("there is no such VAE", where=name, fix=_similar_hint(path))


def _chosen(parts: Iterable[str]) -> tuple[Part, ...]:
    parts = tuple(parts)
    assert parts and set(parts) <= set(ALL_PARTS), parts
    names: dict[str, tuple[Part, ...]] = {
        "unet": ("unet",),
        "text_encoders": ("text_encoder_1", "text_encoder_2"),
        "vae": ("vae",),
    }
    return tuple(part for name in ALL_PARTS if name in parts for part in names[name])


def _require_whole(bundle: ModelBundle, where: str) -> None:
    absent = [PART_NAMES[part] for part in PARTS if getattr(bundle, part) is None]
    if absent:
        raise UserError(f"cannot save a model without its {', '.join(absent)}", where=where, fix="load all parts")


def _folder_hint(folder: Path) -> str:
    files = sorted(path.name for path in folder.iterdir() if path.suffix in _ENDINGS)
    if files:
        return f"give the file itself, e.g. {folder / files[0]}"
    return "give a single file, or the folder that holds model_index.json"


def _similar_hint(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    return "give a .safetensors or .ckpt file, a diffusers folder, a hub id (owner/name), or the name tiny"

"""Which modules get an adapter and what sd-scripts calls them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

PARTS = ("te1", "te2", "unet")

# Adapters sit on the Linear and Conv2d modules inside modules of these classes (lora_format.md §1).
TEXT_CLASSES = frozenset({"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"})
UNET_CLASSES = frozenset({"Transformer2DModel"})
UNET_CONV_CLASSES = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})


def _same(path: str) -> str:
    return path


@dataclass(frozen=True)
class AdapterRoot:
    """A model that adapters are put on, with the naming of its modules in sd-scripts' files.

    `rename` turns a module path of this library (dots) into sd-scripts' path (dots). `unused_paths` are the
    paths below which the model's output is never used (the last layer of a text encoder that is read at the
    layer before it): their adapters exist in the file and are not trained.
    """

    part: str
    prefix: str
    module: nn.Module
    rename: Callable[[str], str] = _same
    unused_paths: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.part in PARTS, self.part


@dataclass(frozen=True)
class Target:
    """One module that can carry an adapter; `alias` is its name in files that use this library's own paths."""

    name: str
    alias: str
    part: str
    module: nn.Linear | nn.Conv2d
    unused: bool = False

    @property
    def is_spatial_conv(self) -> bool:
        """Whether the module looks at more than one cell: such modules use the conv rank."""
        return isinstance(self.module, nn.Conv2d) and tuple(self.module.kernel_size) != (1, 1)


def all_targets(roots: list[AdapterRoot]) -> Iterator[Target]:
    """Every Linear and Conv2d of all roots: what a file may name."""
    for root in roots:
        for path, module in root.module.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and path:
                yield _target(root, path, module)


def default_targets(roots: list[AdapterRoot], *, with_conv: bool) -> Iterator[Target]:
    """The modules that training adapts by sd-scripts' rule; with_conv adds the U-Net's ResNet and sampler blocks."""
    unet_classes = UNET_CLASSES | UNET_CONV_CLASSES if with_conv else UNET_CLASSES
    for root in roots:
        classes = unet_classes if root.part == "unet" else TEXT_CLASSES
        inside = [path + "." for path, module in root.module.named_modules() if type(module).__name__ in classes]
        prefixes = tuple(inside)
        for path, module in root.module.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d) or not path.startswith(prefixes):
                continue
            if root.part == "unet" or isinstance(module, nn.Linear):
                yield _target(root, path, module)


def _target(root: AdapterRoot, path: str, module: nn.Linear | nn.Conv2d) -> Target:
    unused = any(path == below or path.startswith(below + ".") for below in root.unused_paths)
    name, alias = (f"{root.prefix}_{p}".replace(".", "_") for p in (root.rename(path), path))
    return Target(name=name, alias=alias, part=root.part, module=module, unused=unused)

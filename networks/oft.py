"""OFT: rotates groups of a layer's outputs, so that angles between its neurons stay as they are.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", as sd-scripts has it (lora_format.md
§4): the outputs are cut into network_dim blocks, R = (I + Q)(I - Q)^-1 per block with Q = A - A^T skew-symmetric, and
W'_k = R_k^T W_k. The norm of all of Q is held at or below c = alpha * out.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from library.log import get_logger
from networks._adapter import Adapter
from networks._args import check_from_weights, lora_args, neuron_dropout
from networks._build import DEFAULT_DIM, network_facts, read_modules
from networks._files import OFT
from networks._keys import AdapterRoot, default_targets
from networks._network import AdapterNetwork

logger = get_logger(__name__)

# What of a model this kind can adapt.
PARTS = ("unet",)
PREFIX = "oft_unet"


class OftAdapter(Adapter):
    """One module's rotation: `oft_blocks` (num_blocks, b, b) is A, zero at the start; alpha bounds the rotation."""

    def __init__(self, base: nn.Linear | nn.Conv2d, *, num_blocks: int, alpha: float) -> None:
        super().__init__(base)
        outputs = base.weight.shape[0]
        device = "meta" if base.weight.is_meta else "cpu"
        size = outputs // num_blocks
        self.oft_blocks = nn.Parameter(torch.zeros(num_blocks, size, size, device=device))
        self.register_buffer("alpha", torch.tensor(float(alpha), device=device))
        self.limit = float(alpha) * outputs  # a plain number: reading the buffer would wait for the GPU
        self.register_load_state_dict_post_hook(lambda module, _: module._refresh_limit())

    def _refresh_limit(self) -> None:
        self.limit = float(self.alpha) * self.base.weight.shape[0]

    def load_file_tensors(self, values: Mapping[str, Tensor]) -> None:
        """Take over a file's tensors."""
        self.load_state_dict({**values, "alpha": values["alpha"].float().reshape(())})

    def rotation_change(self) -> Tensor:
        """R - I of every block, (num_blocks, b, b) float32: 2 Q (I - Q)^-1, exactly 0 while A is."""
        with torch.autocast(self.oft_blocks.device.type, enabled=False):
            blocks = self.oft_blocks.float()
            skew = blocks - blocks.transpose(1, 2)
            norm = skew.norm()
            skew = skew * ((norm.clamp(max=self.limit) + 1e-8) / (norm + 1e-8))
            eye = torch.eye(skew.shape[1], device=skew.device)
            return _solve(eye - skew, 2 * skew)

    def forward_delta(self, x: Tensor) -> Tensor:
        """W'x - Wx."""
        base = self.base
        weight = base.weight.to(x.dtype)
        if isinstance(base, nn.Linear):
            return self._rotate(F.linear(x, weight))
        return self._rotate(F.conv2d(x, weight, None, base.stride, base.padding, base.dilation))

    def forward_delta_from(self, x: Tensor, base_output: Tensor) -> Tensor:
        """W'x - Wx, from the base's output without its bias."""
        bias = self.base.bias
        if bias is not None:
            base_output = base_output - (bias.view(-1, 1, 1) if isinstance(self.base, nn.Conv2d) else bias)
        return self._rotate(base_output)

    def delta_weight(self) -> Tensor:
        """R^T W - W as a float32 weight of the base's shape."""
        weight = self.base.weight.float()
        return self._rotate(weight.flatten(1).T).T.reshape(weight.shape)

    def _rotate(self, y: Tensor) -> Tensor:
        """(R - I)^T on the outputs y: channels last, or in dimension 1 of four."""
        change = self.rotation_change().to(y.dtype)
        last = y.movedim(1, -1) if y.ndim == 4 else y
        grouped = last.unflatten(-1, (change.shape[0], change.shape[1]))
        turned = torch.einsum("...kn,knm->...km", grouped, change).flatten(-2)
        return turned.movedim(-1, 1) if y.ndim == 4 else turned


# Above it blocks are solved one by one on a CPU: PyTorch's batched solver there fails with several threads (oneMKL
# refuses blocks of 160 in a batch of 4, and the call never returns).
_MAX_BATCHED_ON_CPU = 64


def _solve(a_KNN: Tensor, b_KNN: Tensor) -> Tensor:
    """a^-1 b of every block, (num_blocks, b, b)."""
    if a_KNN.device.type == "cpu" and a_KNN.shape[1] > _MAX_BATCHED_ON_CPU:
        return torch.stack([torch.linalg.solve(a, b) for a, b in zip(a_KNN, b_KNN, strict=True)])
    return torch.linalg.solve(a_KNN, b_KNN)


def create(
    roots: list[AdapterRoot],
    *,
    dim: int | None,
    alpha: float | None,
    dropout: float | None = None,
    args: Mapping[str, str] | None = None,
    multiplier: float = 1.0,
    generator: torch.Generator | None = None,
) -> AdapterNetwork:
    """A new OFT on the U-Net's attention linears: dim is the number of blocks (default 4), alpha the constraint.

    args: enable_all_linear adds the other linears of the transformers, enable_conv those of the ResNet and sampler
    blocks with their convolutions (which includes all linears). Text encoders are not adapted. Nothing is random.
    """
    parsed = lora_args(args or {}, "oft")
    neuron_dropout(parsed, dropout, "oft")
    dim = dim or DEFAULT_DIM
    if not alpha:
        raise UserError("network_alpha is 0, which leaves no rotation", "network_alpha", "set about 1e-3")
    if alpha > 0.1:
        logger.warning("network_alpha %g holds nothing back: for networks.oft about 1e-3 is usual", alpha)
    pairs = []
    everything = parsed.enable_all_linear or parsed.enable_conv
    for target in default_targets(_unet_roots(roots), with_conv=parsed.enable_conv):
        if not everything and "_attn1_" not in target.name and "_attn2_" not in target.name:
            continue
        outputs = target.module.weight.shape[0]
        if outputs % dim:
            raise UserError(
                f"{target.name} has {outputs} outputs, which {dim} blocks do not divide", "network_dim", "use a divisor"
            )
        pairs.append((target, OftAdapter(target.module, num_blocks=dim, alpha=alpha)))
    facts = network_facts("oft", str(dim), str(float(alpha)), args)
    return AdapterNetwork(pairs, facts=facts, multiplier=multiplier, form=OFT)


def create_from_weights(
    roots: list[AdapterRoot],
    tensors: Mapping[str, Tensor],
    *,
    multiplier: float = 1.0,
    where: str = "network_weights",
    dropout: float | None = None,
    args: Mapping[str, str] | None = None,
) -> AdapterNetwork:
    """The OFT that a file describes: its modules, blocks and constraints, filled with its weights."""
    check_from_weights(args or {})
    neuron_dropout(lora_args(args or {}, "oft"), dropout, "oft")
    targets, known = read_modules(_unet_roots(roots), tensors, where=where, form=OFT)
    pairs = []
    for name, values in known.items():
        adapter = OftAdapter(targets[name].module, num_blocks=values["oft_blocks"].shape[0], alpha=1.0)
        adapter.load_file_tensors(values)
        pairs.append((targets[name], adapter))
    dims = {str(adapter.oft_blocks.shape[0]) for _, adapter in pairs}
    alphas = {str(float(adapter.alpha)) for _, adapter in pairs}
    dim, alpha = (found.pop() if len(found) == 1 else "Dynamic" for found in (dims, alphas))
    return AdapterNetwork(pairs, facts=network_facts("oft", dim, alpha, args), multiplier=multiplier, form=OFT)


def _unet_roots(roots: list[AdapterRoot]) -> list[AdapterRoot]:
    return [replace(root, prefix=PREFIX) for root in roots if root.part in PARTS]

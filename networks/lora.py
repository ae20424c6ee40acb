"""LoRA and LoCon: low-rank additions to Linear and Conv2d layers, in sd-scripts' file format.

y = W x + multiplier * (alpha / r) * up(drop(down(x))), r the rank (lora_format.md §1).
"""

import json
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from library.log import get_logger
from networks._adapter import Adapter
from networks._args import lora_args, neuron_dropout
from networks._files import check_widths, group_tensors
from networks._keys import AdapterRoot, all_targets, default_targets
from networks._network import AdapterNetwork

logger = get_logger(__name__)


class LoraAdapter(Adapter):
    """One module's LoRA: down (r, in) and up (out, r), or for a Conv2d down (r, in, kh, kw) and up (out, r, 1, 1).

    Down starts kaiming-uniform (a = sqrt 5), up zero, so at the start the model is exactly the base model.
    """

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        *,
        rank: int,
        alpha: float | None,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        self.rank = rank
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        # Made on the CPU, so that a seed gives the same start on every device; meta stays meta.
        device = "meta" if base.weight.is_meta else "cpu"
        if isinstance(base, nn.Conv2d):
            geometry = {"kernel_size": base.kernel_size, "stride": base.stride, "padding": base.padding}
            self.lora_down = nn.utils.skip_init(
                nn.Conv2d, base.in_channels, rank, **geometry, dilation=base.dilation, bias=False, device=device
            )
            self.lora_up = nn.utils.skip_init(nn.Conv2d, rank, base.out_channels, 1, bias=False, device=device)
        else:
            self.lora_down = nn.utils.skip_init(nn.Linear, base.in_features, rank, bias=False, device=device)
            self.lora_up = nn.utils.skip_init(nn.Linear, rank, base.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha or rank), device=device))
        self.scale = float(alpha or rank) / rank  # a plain number: reading the buffer would wait for the GPU
        self.register_load_state_dict_post_hook(lambda module, _: module._refresh_scale())

    def _refresh_scale(self) -> None:
        self.scale = float(self.alpha) / self.rank

    def load_file_tensors(self, values: Mapping[str, Tensor]) -> None:
        """Take over a file's tensors; an alpha that is missing is the rank."""
        alpha = values.get("alpha", torch.tensor(float(self.rank)))
        self.load_state_dict({**values, "alpha": alpha.float().reshape(())})

    def forward_delta(self, x: Tensor) -> Tensor:
        """(alpha / r) * up(drop(down(x))), in training with the three dropouts."""
        if self.training and self.module_dropout and torch.rand(()) < self.module_dropout:
            # Skipped, yet with a zero gradient on this and every other rank: DDP needs all parameters touched.
            return (self.lora_down.weight.sum() + self.lora_up.weight.sum()) * 0.0
        h = self.lora_down(x)
        scale = self.scale
        if self.training and self.dropout:
            h = F.dropout(h, self.dropout)
        if self.training and self.rank_dropout:
            rank_dim = 1 if h.ndim == 4 else h.ndim - 1
            shape = [h.shape[d] if d in (0, rank_dim) else 1 for d in range(h.ndim)]
            h = h * (torch.rand(shape, device=h.device) > self.rank_dropout).to(h.dtype)
            scale = scale / (1.0 - self.rank_dropout)
        return self.lora_up(h) * scale

    def delta_weight(self) -> Tensor:
        """(alpha / r) * up @ down as a float32 weight of the base's shape."""
        up = self.lora_up.weight.float().flatten(1)
        down = self.lora_down.weight.float().flatten(1)
        return (up @ down * self.scale).reshape(self.base.weight.shape)


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
    """A new LoRA on the roots' modules: dim is the rank (default 4), alpha None or 0 means dim.

    With `conv_dim` in args the U-Net's ResNet and sampler blocks are adapted as well: 3x3 convolutions with
    conv_dim and conv_alpha, 1x1 convolutions and linears with dim and alpha. The generator decides the start of
    the down weights; without one, torch's global generator does.
    """
    parsed = lora_args(args or {})
    drop = neuron_dropout(parsed, dropout)
    dim = dim or 4
    if dim < 1:
        raise UserError(f"network_dim is {dim}", "network_dim", "give 1 or more")

    def make(target) -> LoraAdapter:
        spatial = target.is_spatial_conv
        return LoraAdapter(
            target.module,
            rank=(parsed.conv_dim or dim) if spatial else dim,
            alpha=parsed.conv_alpha if spatial else alpha,
            dropout=drop,
            rank_dropout=parsed.rank_dropout,
            module_dropout=parsed.module_dropout,
            generator=generator,
        )

    pairs = [(target, make(target)) for target in default_targets(roots, with_conv=parsed.conv_dim is not None)]
    facts = _facts(str(dim), str(float(alpha or dim)))
    given = {key: str(value) for key, value in (args or {}).items()}
    if given:
        facts["ss_network_args"] = json.dumps(given)
    return AdapterNetwork(pairs, facts=facts, multiplier=multiplier)


def create_from_weights(
    roots: list[AdapterRoot],
    tensors: Mapping[str, Tensor],
    *,
    multiplier: float = 1.0,
    where: str = "network_weights",
) -> AdapterNetwork:
    """The network that a file describes: its modules, their ranks and alphas, filled with its weights.

    Every Linear and Conv2d of the roots can be named by the file, also those that training does not adapt by
    default. Names that are not in the models are counted in a warning.
    """
    targets = {target.name: target for target in all_targets(roots)}
    modules = group_tensors(tensors, targets.values(), where=where)
    known = {name: values for name, values in modules.items() if name in targets}
    if len(known) < len(modules):
        logger.warning("%s: %d of its %d modules are not in this model", where, len(modules) - len(known), len(modules))
    check_widths(targets, known, where=where)
    pairs, ranks, alphas = [], set(), set()
    for name, values in known.items():
        adapter = LoraAdapter(targets[name].module, rank=values["lora_down.weight"].shape[0], alpha=None)
        adapter.load_file_tensors(values)
        pairs.append((targets[name], adapter))
        ranks.add(adapter.rank)
        alphas.add(float(adapter.alpha))
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    alpha = str(alphas.pop()) if len(alphas) == 1 else "Dynamic"
    return AdapterNetwork(pairs, facts=_facts(dim, alpha), multiplier=multiplier)


def _facts(dim: str, alpha: str) -> dict[str, str]:
    return {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": alpha}

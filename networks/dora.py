"""DoRA: LoRA gives a weight its direction, a trained vector its magnitude.

Liu et al. 2024, "DoRA", equation 5: W' = m * (W + s B A) / |W + s B A|, with s = alpha / r, and the norm treated as a
constant for gradients (section 4.3). The norm is taken over the inputs of each output, as PEFT and LyCORIS do by
default, or with wd_on_output=False over the outputs of each input, as the paper writes it and ComfyUI computes it.
Files: LoRA's tensors and `dora_scale`, (out, 1) or (out, 1, 1, 1); over inputs (1, in) or (1, in, 1, 1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks._args import LoraArgs
from networks._build import Family, Size
from networks._files import DORA
from networks.lora import LoraAdapter


class DoraAdapter(LoraAdapter):
    """One module's DoRA. `dora_scale` starts as the norms of the base's weight, so the start is exactly the base.

    on_output: one magnitude for each output, else for each input. The three dropouts act on the low-rank branch.
    """

    float32_tensors = frozenset({"alpha", "dora_scale"})
    base_square: Tensor

    def __init__(self, base: nn.Linear | nn.Conv2d, *, on_output: bool = True, **settings) -> None:
        super().__init__(base, **settings)
        self.on_output = on_output
        device = self.lora_up.weight.device
        self.register_buffer("base_square", self._base_square().to(device), persistent=False)
        self._seen = base.weight._version
        self.dora_scale = nn.Parameter(self.base_square.sqrt())

    @property
    def input_dtype(self) -> torch.dtype:
        """That of the two factors; the magnitudes are float32."""
        return self.lora_down.weight.dtype

    def forward_delta(self, x: Tensor) -> Tensor:
        """W'x - Wx."""
        return self._delta(x, self._base_product(x), None)

    def forward_delta_from(self, x: Tensor, base_output: Tensor) -> Tensor:
        """W'x - Wx, Wx taken from the base's output."""
        return self._delta(x, base_output, self.base.bias)

    def delta_weight(self) -> Tensor:
        """W' - W as a float32 weight of the base's shape."""
        direction = super().delta_weight()
        weight = self.base.weight.float()
        return self._factor().float() * (weight + direction) - weight

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """As for LoRA, but magnitudes stay float32: only their small difference to the norms acts."""
        super().place(device, dtype)
        self.dora_scale.data = self.dora_scale.data.float()
        self.base_square = self._base_square()

    def load_file_tensors(self, values) -> None:
        """Take over a file's tensors; the norms that they came from are not in it."""
        super().load_file_tensors({**values, "dora_scale": values["dora_scale"].float()})

    def _delta(self, x: Tensor, output: Tensor, bias: Tensor | None) -> Tensor:
        """W'x - Wx from the base's output and the bias that is in it."""
        if self.is_skipped():
            return self.untouched()
        factor = self._factor()
        if self.on_output:
            return self._delta_on_output(x, output, bias, factor)
        factor = factor.flatten() if isinstance(self.base, nn.Linear) else factor.view(1, -1, 1, 1)
        h, scale = self.dropped(self.lora_down(x * factor.to(x.dtype)))
        return self._base_product(x * (factor - 1.0).to(x.dtype)) + self.lora_up(h * scale)

    def _delta_on_output(self, x: Tensor, output: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor:
        """f s B A x - (f - 1) b + (f - 1) (W x + b): factors and bias enter as weights, so that only one product and
        one sum are as large as the output."""
        h, scale = self.dropped(self.lora_down(x))
        up = self.lora_up.weight
        up = (up * factor.view(-1, *[1] * (up.ndim - 1))).to(up.dtype)
        change = factor.flatten() - 1.0
        shift = None if bias is None else (-change * bias).to(up.dtype)
        if isinstance(self.base, nn.Linear):
            low = F.linear(h * scale, up, shift)
        else:
            low, change = F.conv2d(h * scale, up, shift), change.view(-1, 1, 1)
        return torch.addcmul(low, output.to(low.dtype), change.to(low.dtype))

    def _factor(self) -> Tensor:
        """m / |W + s B A| in dora_scale's shape; differentiable in m only."""
        return self.dora_scale / self._norm()

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """|W + s B A| per output or input, float32, in dora_scale's shape.

        From |W|^2 + 2 s <W, B A> + s^2 |B A|^2 per row, which needs no weight-sized tensor beside W and is exactly
        |W| while B is zero.
        """
        if self.base.weight._version != self._seen:  # something was merged into the base
            self._seen = self.base.weight._version
            self.base_square = self._base_square()
        with torch.autocast(self.alpha.device.type, enabled=False):
            up, down = self.lora_up.weight.float().flatten(1), self.lora_down.weight.float().flatten(1)
            if self.on_output:
                cross = ((self.base.weight.float().flatten(1) @ down.T) * up).sum(1)
                square = ((up @ (down @ down.T)) * up).sum(1)
            else:
                weight, low = self.base.weight.float(), (up @ down).view(self.base.weight.shape)
                others = [d for d in range(weight.ndim) if d != 1]
                cross, square = (weight * low).sum(others), low.square().sum(others)
            change = (2 * self.scale * cross + self.scale**2 * square).view(self.dora_scale.shape)
            floor = torch.finfo(torch.float32).tiny
            return (self.base_square.float() + change).clamp_min(floor).sqrt()

    @torch.no_grad()
    def _base_square(self) -> Tensor:
        weight = self.base.weight
        others = [d for d in range(weight.ndim) if d != (0 if self.on_output else 1)]
        return weight.float().square().sum(others, keepdim=True)

    def _base_product(self, x: Tensor) -> Tensor:
        """W x without the bias."""
        base = self.base
        weight = base.weight if torch.is_autocast_enabled(x.device.type) else base.weight.to(x.dtype)
        if isinstance(base, nn.Linear):
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, base.stride, base.padding, base.dilation)


def _make(
    base: nn.Linear | nn.Conv2d, size: Size, args: LoraArgs, dropout: float, generator: torch.Generator | None
) -> DoraAdapter:
    on_output = args.wd_on_output
    if size.tensors is not None:
        on_output = size.tensors["dora_scale"].shape[0] == base.weight.shape[0]
    return DoraAdapter.of(base, size, args, dropout, generator, on_output=on_output)


_family = Family("dora", _make, DORA)
create = _family.create
create_from_weights = _family.create_from_weights

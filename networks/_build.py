"""Building networks of the LoRA family: which module gets which rank and alpha, from arguments or from a file."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.log import get_logger
from networks._adapter import Adapter
from networks._args import LoraArgs, check_from_weights, check_sizes, lora_args, neuron_dropout
from networks._blocks import block_index
from networks._files import LORA, FileFormat, check_widths, group_tensors
from networks._groups import RatePlan
from networks._keys import AdapterRoot, Target, all_targets, default_targets
from networks._network import AdapterNetwork
from networks._rules import find_rule

logger = get_logger(__name__)

DEFAULT_DIM = 4


@dataclass(frozen=True)
class Size:
    """What one module's adapter is made with: rank, alpha as it stands in the file, and a file's tensors, if any."""

    rank: int
    alpha: float | None
    tensors: Mapping[str, Tensor] | None = None


Make = Callable[[nn.Linear | nn.Conv2d, Size, LoraArgs, float, torch.Generator | None], Adapter]


@dataclass(frozen=True)
class Family:
    """One kind of the LoRA family: its name in networks/, its file format, and what makes an adapter.

    make(module, size, args, dropout, generator).
    """

    kind: str
    make: Make
    form: FileFormat = LORA

    def create(
        self,
        roots: list[AdapterRoot],
        *,
        dim: int | None,
        alpha: float | None,
        dropout: float | None = None,
        args: Mapping[str, str] | None = None,
        multiplier: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> AdapterNetwork:
        """A new network on the roots' modules: dim is the rank (default 4), alpha None or 0 means dim.

        With `conv_dim` in args the U-Net's ResNet and sampler blocks are adapted as well: 3x3 convolutions with
        conv_dim and conv_alpha, 1x1 convolutions and linears with dim and alpha; further keys: `networks/_args.py`.
        The generator decides the start of random weights; without one, torch's global generator does.
        """
        if dim is not None and dim < 1:
            raise UserError(f"network_dim is {dim}", "network_dim", "give 1 or more")
        parsed = lora_args(args or {}, self.kind)
        drop = neuron_dropout(parsed, dropout, self.kind)
        check_sizes(parsed, self.kind, dim=dim)
        dim = dim or DEFAULT_DIM
        sizes, rule_rates = _plan(roots, parsed, dim=dim, alpha=alpha)
        pairs = [(target, self.make(target.module, size, parsed, drop, generator)) for target, size in sizes]
        facts = self.facts(str(dim), str(float(alpha or dim)), args)
        rates = RatePlan.of(parsed, rule_rates)
        if rates.blocks is not None:
            logger.info(
                "learning rate of the U-Net's blocks 0 to 22, as factors: %s", ", ".join(f"{w:g}" for w in rates.blocks)
            )
        return AdapterNetwork(pairs, facts=facts, multiplier=multiplier, form=self.form, rates=rates)

    def create_from_weights(
        self,
        roots: list[AdapterRoot],
        tensors: Mapping[str, Tensor],
        *,
        multiplier: float = 1.0,
        where: str = "network_weights",
        dropout: float | None = None,
        args: Mapping[str, str] | None = None,
    ) -> AdapterNetwork:
        """The network that a file describes: its modules, their ranks and alphas, filled with its weights.

        Every Linear and Conv2d of the roots can be named by the file, also those that training does not adapt by
        default. Names that are not in the models are counted in a warning. dropout and args say how it trains on;
        what the file decides cannot be among them.
        """
        check_from_weights(args or {})
        parsed = lora_args(args or {}, self.kind)
        drop = neuron_dropout(parsed, dropout, self.kind)
        targets, known = read_modules(roots, tensors, where=where, form=self.form)
        pairs, ranks, alphas = [], set(), set()
        for name, values in known.items():
            rank = values["lora_down.weight"].shape[0]
            adapter = self.make(targets[name].module, Size(rank, None, values), parsed, drop, None)
            adapter.load_file_tensors(values)
            pairs.append((targets[name], adapter))
            ranks.add(rank)
            alphas.add(float(adapter.state_dict()["alpha"]))
        facts = self.facts(_one_or_dynamic(ranks), _one_or_dynamic(alphas), args)
        rates = RatePlan.of(parsed, {})
        return AdapterNetwork(pairs, facts=facts, multiplier=multiplier, form=self.form, rates=rates)

    def facts(self, dim: str, alpha: str, args: Mapping[str, str] | None) -> dict[str, str]:
        """What the file's metadata says about the network."""
        return network_facts(self.kind, dim, alpha, args)


def network_facts(kind: str, dim: str, alpha: str, args: Mapping[str, str] | None) -> dict[str, str]:
    """The ss_network_* metadata of a network of this suite."""
    facts = {"ss_network_module": f"networks.{kind}", "ss_network_dim": dim, "ss_network_alpha": alpha}
    if args:
        facts["ss_network_args"] = json.dumps({key: str(value) for key, value in args.items()})
    return facts


def read_modules(
    roots: list[AdapterRoot], tensors: Mapping[str, Tensor], *, where: str, form: FileFormat
) -> tuple[dict[str, Target], dict[str, dict[str, Tensor]]]:
    """(every target by name, the file's tensors of those that are in the models); checked for names and widths."""
    targets = {target.name: target for target in all_targets(roots)}
    modules = group_tensors(tensors, targets.values(), where=where, form=form)
    known = {name: values for name, values in modules.items() if name in targets}
    if len(known) < len(modules):
        logger.warning("%s: %d of its %d modules are not in this model", where, len(modules) - len(known), len(modules))
    check_widths(targets, known, where=where)
    return targets, known


def _one_or_dynamic(values: set) -> str:
    return str(values.pop()) if len(values) == 1 else "Dynamic"


def _plan(
    roots: list[AdapterRoot], args: LoraArgs, *, dim: int, alpha: float | None
) -> tuple[list[tuple[Target, Size]], dict[str, tuple[int, float]]]:
    """Targets with their sizes, and the learning rates that rules give to some of them."""
    default = {target.name for target in default_targets(roots, with_conv=args.has_conv)}
    found, rates, used = [], {}, set()
    for target in all_targets(roots):
        number = find_rule(args.target_rules, target.name)
        if number is None and target.name not in default:
            continue
        size = _size(target, args, dim=dim, alpha=alpha)
        if number is not None:
            rule = args.target_rules[number]
            used.add(number)
            if rule.lr is not None:
                rates[target.name] = (number + 1, rule.lr)
            elif _is_off(target, args):
                continue
            rank = rule.dim if rule.dim is not None else size.rank or dim
            size = Size(rank, rule.alpha if rule.alpha is not None else size.alpha)
        elif _is_off(target, args):
            continue
        if size.rank:
            scaled = (size.alpha or size.rank) * (math.sqrt(size.rank) if args.rs_lora else 1.0)
            found.append((target, Size(size.rank, scaled)))
    _check_rules_used(args, used)
    if not found:
        raise UserError("no module of the model is adapted", "network_args", "give some block or rule a rank")
    return found, rates


def _size(target: Target, args: LoraArgs, *, dim: int, alpha: float | None) -> Size:
    """Rank (0: not adapted) and alpha of a module without rules (block_lr.md §2)."""
    block = block_index(target.name) if target.part == "unet" else None
    dims, alphas = args.block_dims, args.block_alphas
    if target.is_spatial_conv:
        # Without conv_dim only a rule adapts such a module, as large as the others.
        dims, alphas = args.conv_block_dims, args.conv_block_alphas
        if args.has_conv:
            dim, alpha = args.conv_dim or 0, args.conv_alpha
    if block is None:
        return Size(dim, alpha)
    return Size(dims[block] if dims is not None else dim, alphas[block] if alphas is not None else alpha)


def _is_off(target: Target, args: LoraArgs) -> bool:
    """Whether the weight of a module's block is 0."""
    block = block_index(target.name) if target.part == "unet" else None
    return args.block_rates is not None and block is not None and not args.block_rates[block]


def _check_rules_used(args: LoraArgs, used: set[int]) -> None:
    for number, rule in enumerate(args.target_rules):
        if number not in used:
            raise UserError(
                f'rule {number + 1} of target_rules, "{rule.pattern.pattern}", decides about no module',
                "network_args",
                "names are as in the file, such as lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q; an "
                "earlier rule may have taken all that it finds",
            )

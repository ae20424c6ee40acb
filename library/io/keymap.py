"""Two-way renaming of tensors between checkpoint layouts, driven by a table of rules.

A rule pairs names of layout A with names of layout B. A name is a dotted path and stands for everything below it, so
one rule moves a whole module; the longest matching rule wins. Rules can also change the tensors: transpose, drop or
add the two unit dimensions of a 1x1 convolution, or split one tensor of A into several of B.

Conversion is lazy: `KeyMap.view` reads and converts a tensor when it is asked for, so a checkpoint passes through
without a second copy of itself in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Convert = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Rule:
    """Names of layout A, names of layout B, and the functions that turn the tensors of one side into the other's."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    a_to_b: Convert | None = None
    b_to_a: Convert | None = None


def rename(a: str, b: str) -> Rule:
    """Same tensors under another name; `a` and `b` may be modules or tensors."""
    return Rule((a,), (b,))


def transpose(a: str, b: str) -> Rule:
    """A matrix stored the other way round in B."""
    return Rule((a,), (b,), *([lambda tensors: (tensors[0].t().contiguous(),)] * 2))


def conv1x1(a: str, b: str) -> Rule:
    """A 1x1 convolution (out, in, 1, 1) in A that is a linear layer (out, in) in B; already linear stays as it is."""
    return Rule(
        (a,),
        (b,),
        lambda tensors: (tensors[0].flatten(1),),
        lambda tensors: (tensors[0].reshape(*tensors[0].shape[:2], 1, 1),),
    )


def split(a: str, b: Sequence[str]) -> Rule:
    """One tensor of A cut along dimension 0 into equal parts of B, e.g. a fused q, k, v projection."""
    return Rule(
        (a,),
        tuple(b),
        lambda tensors: tuple(tensors[0].chunk(len(b))),
        lambda tensors: (torch.cat(tuple(tensors)),),
    )


class UnmappedKeys(ValueError):
    """Names that no rule covers, or of which a rule lacks partners; `unknown` and `incomplete` list them."""

    def __init__(self, unknown: Sequence[str], incomplete: Sequence[str]) -> None:
        super().__init__(
            f"no rule for {len(unknown)} keys {list(unknown[:5])}, partners missing: {list(incomplete[:5])}"
        )
        self.unknown = tuple(unknown)
        self.incomplete = tuple(incomplete)


@dataclass(frozen=True)
class _Step:
    """How one target tensor is made: `convert` the `sources` and take part `index`."""

    sources: tuple[str, ...]
    convert: Convert | None
    index: int


class KeyMap:
    """A table of rules that can be read in both directions."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        self._by_name: tuple[dict[str, Rule], dict[str, Rule]] = ({}, {})
        for rule in self.rules:
            for table, names in zip(self._by_name, (rule.a, rule.b), strict=True):
                for name in names:
                    assert name not in table, f"two rules for {name}"
                    table[name] = rule

    def name(self, path: str, *, reverse: bool = False) -> str | None:
        """Rename one module or tensor path, A to B (B to A with `reverse`); None when no one-to-one rule covers it."""
        found = self._match(path, reverse)
        if found is None:
            return None
        rule, rest = found
        ours, theirs = (rule.b, rule.a) if reverse else (rule.a, rule.b)
        return theirs[0] + rest if len(ours) == len(theirs) == 1 else None

    def view(self, source: Mapping[str, Tensor], *, reverse: bool = False) -> MappedTensors:
        """Show `source` under the names of the other layout; raises UnmappedKeys when a name has no place there."""
        steps, unknown, incomplete = self._plan(source.keys(), reverse)
        if unknown or incomplete:
            raise UnmappedKeys(unknown, incomplete)
        return MappedTensors(source, steps)

    def _match(self, path: str, reverse: bool) -> tuple[Rule, str] | None:
        """Find the rule with the longest name that is `path` or a module above it, and what is left of the path."""
        table, end = self._by_name[reverse], len(path)
        while end > 0:
            rule = table.get(path[:end])
            if rule is not None:
                return rule, path[end:]
            end = path.rfind(".", 0, end)
        return None

    def _plan(self, names: Iterable[str], reverse: bool) -> tuple[dict[str, _Step], list[str], list[str]]:
        present = dict.fromkeys(names)
        steps: dict[str, _Step] = {}
        unknown: list[str] = []
        incomplete: list[str] = []
        for name in present:
            found = self._match(name, reverse)
            if found is None:
                unknown.append(name)
                continue
            rule, rest = found
            ours, theirs = (rule.b, rule.a) if reverse else (rule.a, rule.b)
            convert = rule.b_to_a if reverse else rule.a_to_b
            sources = tuple(part + rest for part in ours)
            incomplete += [part for part in sources if part not in present]
            for index, target in enumerate(theirs):
                steps[target + rest] = _Step(sources, convert, index)
        return steps, unknown, sorted(set(incomplete))


class MappedTensors(Mapping[str, Tensor]):
    """Tensors of one layout under the names of another, converted when read; nothing is kept."""

    def __init__(self, source: Mapping[str, Tensor], steps: Mapping[str, _Step]) -> None:
        self._source = source
        self._steps = steps

    def __getitem__(self, name: str) -> Tensor:
        step = self._steps[name]
        tensors = [self._source[part] for part in step.sources]
        return tensors[0] if step.convert is None else step.convert(tensors)[step.index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, name: object) -> bool:  # the inherited one would read the tensor to find out
        return name in self._steps

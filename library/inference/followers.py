"""What acts on the U-Net while a batch is drawn: networks with control images, Deep Shrink and their like."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.diffusion.conditioning import TextCond
from library.inference.request import GenRequest


@dataclass
class UNetCall:
    """One call of the U-Net, number `number` (from 0) of `of`, with what it is given.

    The rows are those of the branches of guidance, one after the other (guidance.guided), each with a row per picture.
    extra: further arguments of the U-Net, which followers fill.
    """

    number: int
    of: int
    x_BChw: Tensor
    t_B: Tensor
    text: TextCond
    sizes_B6: Tensor
    extra: dict[str, Any] = field(default_factory=dict)


BeforeCall = Callable[[UNetCall], None]


class Follower(Protocol):
    """Something that changes what the U-Net does for one batch and leaves it as it was."""

    def on(
        self, batch: Sequence[GenRequest], *, calls: int, device: torch.device
    ) -> AbstractContextManager[BeforeCall | None]:
        """Act on a batch that is drawn together, with `calls` calls of the U-Net, until the context ends.

        What is yielded is called before each of them; None when nothing is to be done then. Nothing of a batch may
        be left afterwards, whatever happened.
        """
        ...


def models_of(followers: Sequence[Follower]) -> list[nn.Module]:
    """The models that followers call beside the U-Net, with rows like its own: their `models`, if they have any."""
    return [model for follower in followers for model in getattr(follower, "models", ())]


@contextmanager
def all_on(
    followers: Sequence[Follower], batch: Sequence[GenRequest], *, calls: int, device: torch.device
) -> Iterator[BeforeCall]:
    """All followers at work, in order, as one."""
    with ExitStack() as stack:
        each = [stack.enter_context(follower.on(batch, calls=calls, device=device)) for follower in followers]

        def before_call(call: UNetCall) -> None:
            for before in each:
                if before is not None:
                    before(call)

        yield before_call

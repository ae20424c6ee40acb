"""What happens around the steps: each hook is one small object that the loop knows only by its event."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from library.errors import UserError
from library.log import get_logger
from library.training.clock import Clock
from library.training.metrics import Meters
from library.training.state import Progress

log = get_logger(__name__)


class Event(Enum):
    """START before the first step, STEP after each optimizer step, EPOCH after each complete epoch, END at the end."""

    START = auto()
    STEP = auto()
    EPOCH = auto()
    END = auto()


@dataclass
class View:
    """What hooks see of a run. `request_stop` ends the loop after the running step.

    failure: what makes the run a failed one; raised when everything else is done. requested: names of `requests` that
    the running step answers. clock: where the time goes.
    """

    progress: Progress
    total_steps: int
    num_epochs: int
    meters: Meters
    stop: bool = False
    stop_reason: str = ""
    failure: UserError | None = None
    requested: frozenset[str] = frozenset()
    clock: Clock = field(default_factory=Clock)

    def request_stop(self, reason: str) -> None:
        """End the run after this step, for `reason`."""
        self.stop, self.stop_reason = True, reason


class Hook(Protocol):
    """Called at every event, on every rank."""

    def __call__(self, event: Event, view: View) -> None: ...


@dataclass
class Paused:
    """A hook whose work is no training: the clock stands still while it is at it."""

    hook: Hook

    def __call__(self, event: Event, view: View) -> None:
        with view.clock.pause():
            self.hook(event, view)

"""Steps whose loss or gradient is not finite: counted, and traced to the images they were made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from library.data.table import ImageTable
from library.data.types import SampleKey

# An fp16 scaler starts at 2**16 and halves after each overflow: so many skips in a row are how it finds its scale.
SCALER_BACKOFFS = 20
_SHOWN_STEPS, _SHOWN_IMAGES = 5, 8

# The samples of a micro-batch, and their losses: float32 (B,), still on the device.
Samples = Sequence[tuple[Sequence[SampleKey], Tensor]]


@dataclass
class BrokenSteps:
    """Looks at the records of a run as they come off the device.

    has_scaler: fp16 with a gradient scaler, whose overflows (the loss is finite, the gradient is not) are part of its
    work: they are no fault of the images. total: broken steps so far, without those. in_a_row: skipped steps up to the
    last one seen, overflows included. name_of: from a record's key to the name that a user knows the image by.
    """

    has_scaler: bool = False
    name_of: Callable[[str], str] = str
    total: int = 0
    in_a_row: int = 0
    overflows: int = 0
    _told: list[str] = field(default_factory=list)

    def see(self, record: dict[str, Any], samples: Samples) -> None:
        """Count one record; a broken one gets `images`, the names of the images that may have broken it."""
        loss_is_finite = math.isfinite(record["loss"])
        if loss_is_finite and not record.get("skipped") and math.isfinite(record.get("grad_norm", 0.0)):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.has_scaler and loss_is_finite:
            self.overflows += 1
            return
        self.total += 1
        record["images"] = self._suspects(samples, loss_is_finite=loss_is_finite)
        what = "gradient" if loss_is_finite else "loss"
        self._told.append(f"step {record['step']} ({what}; images: {_some(record['images'], _SHOWN_IMAGES)})")

    def _suspects(self, samples: Samples, *, loss_is_finite: bool) -> list[str]:
        """The images whose own loss is not finite, or all of the step when none stands out on this rank."""
        if not loss_is_finite:
            rows = [(key, loss) for keys, loss_B in samples for key, loss in zip(keys, loss_B.tolist(), strict=True)]
            bad = [key for key, loss in rows if not math.isfinite(loss)]
            if bad:
                return self._names(bad)
        return self._names(key for keys, _ in samples for key in keys)

    def _names(self, keys: Iterable[SampleKey]) -> list[str]:
        """One name per image: a step may hold several visits of one."""
        return [self.name_of(record) for record in dict.fromkeys(key.record for key in keys)]

    def report(self) -> str:
        """A sentence about the broken steps since the last report, or nothing."""
        steps, self._told = self._told, []
        if not steps:
            return ""
        return (
            f"{len(steps)} step{'s' if len(steps) > 1 else ''} had a loss or gradient that is not finite; the weights "
            f"were left as they were: {_some(steps, _SHOWN_STEPS)}"
        )

    def reaches(self, limit: int) -> bool:
        """Whether `limit` steps in a row were skipped; a scaler is given SCALER_BACKOFFS in any case."""
        return self.in_a_row >= (max(limit, SCALER_BACKOFFS) if self.has_scaler else limit)

    def state_dict(self) -> dict[str, Any]:
        """The counts; steps in a row start anew, lest a run that they ended ends again at once when it is resumed."""
        return {"total": self.total, "overflows": self.overflows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.total, self.overflows, self.in_a_row = state["total"], state["overflows"], 0


def _some(items: Sequence[str], count: int) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def image_name(table: ImageTable, key: str) -> str:
    """The path of the image with this key; the key itself where the table has none."""
    for image in table.images.tolist():
        if table.keys.text(image) == key:
            return table.paths.text(image)
    return key

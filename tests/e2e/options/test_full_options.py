"""The options of the full fine-tune are set once: the run shows them, or they are refused by name.

What both scripts read in one place (data, noise and losses, model, saving, pictures) is set in the LoRA trainer's test
and here only with EVERY_OPTION=1 in the environment, for a run costs about a second.
"""

import os

import pytest

from library.config.runs import RUNS
from tests.e2e.options.cases import CASES, ELSEWHERE
from tests.e2e.options.observing import options_of

RUN = "sdxl_train"
SHARED = {"data", "diffusion", "model", "save", "preview"}


def _own(name: str) -> bool:
    return bool(os.environ.get("EVERY_OPTION")) or name == "save_model_as" or RUNS[RUN].group_of(name) not in SHARED


@pytest.mark.e2e
@pytest.mark.parametrize("name", [name for name in options_of(RUN) if name not in ELSEWHERE and _own(name)])
def test_option_acts_or_is_refused(acts_or_is_refused, name):
    acts_or_is_refused(RUN, name)


def test_every_option_has_one_case():
    named = set(options_of(RUN))
    assert named <= set(CASES) | set(ELSEWHERE)
    assert not set(CASES) & set(ELSEWHERE)

"""Every option of the full fine-tune is set once: the run shows it, or the option is refused by name."""

import pytest

from tests.e2e.options.cases import cases_of
from tests.e2e.options.elsewhere import ELSEWHERE
from tests.e2e.options.observing import options_of

RUN = "sdxl_train"


@pytest.mark.e2e
@pytest.mark.parametrize("name", [name for name in options_of(RUN) if name not in ELSEWHERE])
def test_option_acts_or_is_refused(acts_or_is_refused, name):
    acts_or_is_refused(RUN, name)


def test_every_option_has_one_case():
    named = set(options_of(RUN))
    assert named <= set(cases_of(RUN)) | set(ELSEWHERE)
    assert not set(cases_of(RUN)) & set(ELSEWHERE)

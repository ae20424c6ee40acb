"""Every option of the LoRA trainer is set once: the run shows it, or the option is refused by name."""

import pytest

from tests.e2e.options.elsewhere import options_set_here

RUN = "sdxl_train_network"


@pytest.mark.e2e
@pytest.mark.parametrize("name", options_set_here(RUN))
def test_option_acts_or_is_refused(acts_or_is_refused, name):
    acts_or_is_refused(RUN, name)

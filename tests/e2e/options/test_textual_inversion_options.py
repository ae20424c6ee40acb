"""Every option of textual inversion is set once: the run shows it, or the option is refused by name."""

from dataclasses import replace

import pytest

from tests.e2e.options.cases import Case, cases_of
from tests.e2e.options.elsewhere import options_set_here
from tests.e2e.options.observing import BASE

RUN = "sdxl_train_textual_inversion"


@pytest.mark.e2e
@pytest.mark.parametrize("name", options_set_here(RUN))
def test_option_acts_or_is_refused(acts_or_is_refused, name):
    acts_or_is_refused(RUN, name)


@pytest.mark.e2e
def test_a_value_that_changes_nothing_is_found(acts_or_is_refused):
    with pytest.raises(AssertionError, match="seed = 3 changes nothing"):
        acts_or_is_refused(RUN, "seed", Case(BASE["seed"]))
    checked = replace(cases_of(RUN)["skip_cache_check"], value=False, level="whole")
    with pytest.raises(AssertionError, match="skip_cache_check = False changes nothing"):
        acts_or_is_refused(RUN, "skip_cache_check", checked)
    with pytest.raises(AssertionError, match="holds no folder such as 10_cat"):  # a refusal that says nothing of it
        acts_or_is_refused(RUN, "train_data_dir", Case("{folder}/others", level="batches"))

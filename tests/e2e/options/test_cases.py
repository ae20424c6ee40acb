"""Each option of each trainer has one case, or a test elsewhere."""

import pytest

from tests.e2e.options.cases import cases_of
from tests.e2e.options.elsewhere import ELSEWHERE
from tests.e2e.options.observing import options_of


@pytest.mark.parametrize(
    "run",
    ["sdxl_train", "sdxl_train_network", "sdxl_train_textual_inversion", "sdxl_train_control_net_lllite"],
)
def test_every_option_has_one_case(run):
    named, cases = set(options_of(run)), set(cases_of(run))
    assert named <= cases | set(ELSEWHERE)
    assert not cases & set(ELSEWHERE)

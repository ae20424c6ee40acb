"""Optimizers whose state is kept otherwise on a GPU: in 8 bits, and in pages that move to host memory."""

import pytest
import torch

from tests.training.test_optim_resume import check_resume

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind",
    [
        "AdamW",
        "AdamW8bit",
        "PagedAdamW",
        "PagedAdamW8bit",
        "PagedAdamW32bit",
        "Lion8bit",
        "PagedLion8bit",
        "SGDNesterov8bit",
        "AdEMAMix8bit",
        "PagedAdEMAMix8bit",
        "AdamWScheduleFree",
        "Adafactor",
    ],
)
def test_resume_is_exact_on_a_gpu(kind, dtype):
    check_resume(kind, dtype, "cuda")

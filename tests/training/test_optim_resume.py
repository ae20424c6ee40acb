"""k steps, a saved state, the rest: equal to all steps at once, to the bit, for every optimizer that has a name."""

import io

import pytest
import torch

from library.config.choices import OPTIMIZERS, TORCH_OPTIMIZERS
from library.errors import UserError
from library.training.optim import build_optimizer, check_resumed, noted_classes
from library.training.state import _load_into
from library.training.update import GuardedUpdate

SHAPES = ((96, 64), (64,), (8, 4, 3, 3))  # 8-bit state begins at 4096 elements
ESTIMATORS = ("DAdapt", "Prodigy")


def _build(kind: str, dtype: torch.dtype, device: str) -> GuardedUpdate:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(device, dtype)) for shape in SHAPES]
    rate = 1.0 if kind.startswith(ESTIMATORS) else 1e-2
    groups = [{"name": "a", "params": params[:2], "lr": rate}, {"name": "b", "params": params[2:], "lr": rate}]
    arguments = {"SOAP": {"precondition_frequency": 2}}.get(kind, {})
    if kind.startswith(ESTIMATORS):  # from 1e-6 they would not move a bfloat16 in so few steps
        arguments = {"d0": 1e-2}
    return GuardedUpdate(
        build_optimizer(groups, optimizer_type=kind, learning_rate=rate, arguments=arguments), max_norm=1.0
    )


def _steps(update: GuardedUpdate, first: int, last: int) -> None:
    for index in range(first, last):
        generator = torch.Generator().manual_seed(100 + index)
        for param in update.params:
            noise = torch.randn(param.shape, generator=generator).to(param.device)
            param.grad = (0.1 * noise + param.detach().float()).to(param.dtype)
        update()


def check_resume(kind: str, dtype: torch.dtype, device: str) -> None:
    """Three steps, the state through a file, four more: equal to seven steps, and not what it is without the state."""
    whole = _build(kind, dtype, device)
    start = [param.detach().clone() for param in whole.params]
    _steps(whole, 0, 3)
    file = io.BytesIO()
    torch.save(whole.optimizer.state_dict(), file)
    weights = [param.detach().clone() for param in whole.params]
    _steps(whole, 3, 7)

    resumed = _build(kind, dtype, device)
    with torch.no_grad():
        for param, value in zip(resumed.params, weights, strict=True):
            param.copy_(value)
    file.seek(0)
    built = noted_classes(resumed.optimizer)
    _load_into(resumed.optimizer, torch.load(file, weights_only=True), where="optimizer.pt")
    check_resumed(resumed.optimizer, built, where="--resume x")
    _steps(resumed, 3, 7)
    assert all(torch.equal(a, b) for a, b in zip(whole.params, resumed.params, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole.params[:1], start))

    # The same without the state is another run, so the comparison means something.
    forgetful = _build(kind, dtype, device)
    with torch.no_grad():
        for param, value in zip(forgetful.params, weights, strict=True):
            param.copy_(value)
    _steps(forgetful, 3, 7)
    if kind != "SGD" and dtype == torch.float32:  # SGD has no state; a bfloat16 may round the difference away
        assert not all(torch.equal(a, b) for a, b in zip(whole.params, forgetful.params, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [*OPTIMIZERS, *TORCH_OPTIMIZERS])
def test_resume_is_exact(kind, dtype):
    check_resume(kind, dtype, "cpu")


@pytest.mark.parametrize(("saved", "run"), [("AdamW", "NAdam"), ("AdamW", "Lion"), ("AdamW8bit", "AdEMAMix8bit")])
def test_a_state_of_another_optimizer_is_refused(saved, run):
    first, second = _build(saved, torch.float32, "cpu"), _build(run, torch.float32, "cpu")
    _steps(first, 0, 2)
    built = noted_classes(second.optimizer)
    with pytest.raises(UserError, match=r"the state is of the optimizer|does not fit this run"):
        _load_into(second.optimizer, first.optimizer.state_dict(), where="optimizer.pt")
        check_resumed(second.optimizer, built, where="--resume x")


def test_a_state_from_before_classes_were_noted_is_taken():
    first, second = _build("AdamW", torch.float32, "cpu"), _build("AdamW", torch.float32, "cpu")
    state = first.optimizer.state_dict()
    for group in state["param_groups"]:
        del group["class"]
    second.optimizer.load_state_dict(state)
    check_resumed(second.optimizer, noted_classes(first.optimizer), where="--resume x")

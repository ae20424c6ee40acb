"""Optimizers by name, the rates that they really take, and the weights that the schedule-free ones stand for."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from library.errors import UserError
from library.training.optimizer_table import DISTRIBUTIONS, ROWS
from library.training.trainable import ParamGroup

WHERE = "--optimizer_type"


def build_optimizer(
    groups: Sequence[ParamGroup], *, optimizer_type: str, learning_rate: float, arguments: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer over `groups` (each with its own rate), ready for its first step.

    optimizer_type: a name of the table in any case, a class of torch.optim, or a dotted class path. learning_rate: what
    the class takes for a default (schedules with absolute floors are measured by it); where it is 0 the highest rate of
    the groups stands in, because most classes refuse 0. arguments: keywords for the class.
    Raises UserError for an unknown name, a package that is not there, or an argument that the class refuses.
    """
    plain = [dict(group) for group in groups]
    rate = learning_rate or max(group["lr"] for group in groups)
    by_name = {name.lower(): name for name in ROWS}
    name = by_name.get(optimizer_type.lower())
    row = ROWS[name] if name else None
    path = row.path if row else optimizer_type if "." in optimizer_type else f"torch.optim.{optimizer_type}"
    found = import_class(path, where=WHERE, needed_by=name or optimizer_type)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"{path} is not an optimizer class", where=WHERE, fix="name a torch.optim.Optimizer subclass")
    keywords = {**(row.defaults if row else {}), **arguments}
    if name == "AdamW":
        keywords.setdefault("fused", all(p.is_floating_point() for group in plain for p in group["params"]))
    if name == "Adafactor":
        plain, rate = _relative_steps(plain, rate, keywords)
    _check_rates(found, plain)
    try:
        optimizer = found(plain, lr=rate, **keywords)
    except Exception as error:  # classes of many libraries, each with errors of its own
        raise UserError(
            f"{optimizer_type} refuses its arguments: {error or type(error).__name__}",
            where="--optimizer_args",
            fix="remove or correct the argument named above",
        ) from error
    for group in optimizer.param_groups:
        group["class"] = _class_path(optimizer)  # goes into the training state with the group
    if _has_two_modes(optimizer):
        optimizer.train()
    return optimizer


def noted_classes(optimizer: Any) -> set[str]:
    """The classes that `build_optimizer` noted in the groups; a loaded state brings its own."""
    return {group["class"] for group in optimizer.param_groups if "class" in group}


def check_resumed(optimizer: Any, built: set[str], *, where: str) -> None:
    """Raises UserError when the state that was loaded is of another class: names of state are alike, meanings not.

    built: `noted_classes` before the state was loaded.
    """
    saved = noted_classes(optimizer)
    if saved and saved != built:
        raise UserError(
            f"the state is of the optimizer {', '.join(sorted(saved))}, this run has {', '.join(sorted(built))}",
            where=where,
            fix="resume with the optimizer_type that the state was saved with, or start from its weights",
        )


def _class_path(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def try_out(optimizer: torch.optim.Optimizer) -> None:
    """One step over made-up gradients, and its state to a file and back, before anything is loaded.

    For classes of the user's choice: some need a closure or sparse gradients, and some keep objects in their state that
    a training state, which is read without running code from it, cannot hold. Raises UserError.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    try:
        optimizer.step()
    except Exception as error:  # classes of many libraries, each with errors of its own
        raise UserError(
            f"{_class_path(optimizer)} cannot make a plain step: {error}",
            where=WHERE,
            fix="use an optimizer whose step() needs dense gradients only",
        ) from error
    check_plain_data(optimizer.state_dict(), _class_path(optimizer), where=WHERE)


def check_plain_data(state: Mapping[str, Any], name: str, *, where: str) -> None:
    """Raises UserError unless `state` can be saved and read back without running code from the file."""
    file = io.BytesIO()
    try:
        torch.save(dict(state), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # pickle raises whatever the objects inside do
        raise UserError(
            f"the state of {name} cannot be saved and read back as plain data: {error}",
            where=where,
            fix="use one whose state_dict holds numbers, texts and tensors",
        ) from error


def import_class(path: str, *, where: str, needed_by: str) -> Any:
    """What the dotted `path` names. Raises UserError that says which package to install, or which name is wrong."""
    module_name, _, class_name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        package = module_name.split(".")[0]
        known = {row.path.split(".")[0] for row in ROWS.values()}
        fix = "install it or fix the path"
        if package in known:
            fix = f'pip install {DISTRIBUTIONS.get(package, package)}, or all of them: pip install -e ".[optim]"'
        raise UserError(
            f"{needed_by} needs {package}, which does not load here ({error})", where=where, fix=fix
        ) from error
    except AttributeError as error:
        raise UserError(f"{module_name} has no {class_name!r}", where=where, fix="check the class name") from error


def _relative_steps(groups: list[dict], rate: float, keywords: dict[str, Any]) -> tuple[list[dict], float | None]:
    """sd-scripts' rule for Adafactor: relative steps unless told otherwise, warm-up only with them.

    They set the rate themselves: the groups have none then.
    """
    if keywords.get("warmup_init"):
        keywords["relative_step"] = True
    if not keywords.setdefault("relative_step", True):
        return groups, rate
    return [{**group, "lr": None} for group in groups], None


def _check_rates(found: type, groups: list[dict]) -> None:
    """D-Adaptation and Prodigy estimate one step size for all groups; other rates raise there, or count for nothing."""
    rates = sorted({group["lr"] for group in groups if group["lr"]})
    if len(rates) > 1 and found.__module__.split(".")[0] in ("dadaptation", "prodigyopt"):
        raise UserError(
            f"{found.__name__} takes one learning rate for everything, but the groups have {rates}",
            where="--learning_rate, --unet_lr, --text_encoder_lr",
            fix="give all parts one rate (1.0 is usual), or use ProdigyPlusScheduleFree",
        )


def effective_rates(groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """What the optimizer makes of the rates of its `groups`: name in the log -> rate; empty for most optimizers.

    `lr/d*lr/<group>`: D-Adaptation and Prodigy, the rate times the estimate d after the step (sd-scripts' name and
    number). `lr/warmup/<group>`: schedule-free optimizers, the rate after the warm-up that they make themselves.
    """
    rates = {}
    for group in groups:
        # torch.optim.Adafactor and others call something else d.
        if "d" in group and ("d0" in group or "k" in group):
            rates[f"lr/d*lr/{group['name']}"] = float(group["d"]) * group["lr"]
        elif group.get("warmup_steps") and "scheduled_lr" in group:
            rates[f"lr/warmup/{group['name']}"] = float(group["scheduled_lr"])
    return rates


def _has_two_modes(optimizer: Any) -> bool:
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


@contextmanager
def evaluation_mode(optimizer: Any) -> Iterator[None]:
    """Inside, the trained parameters are those to use, save and measure; afterwards training goes on to the bit.

    Schedule-free optimizers (Defazio et al. 2024, arXiv:2405.15682) train at a point y and stand for an average x.
    Their own way back from x to y rounds, so y is kept (in host memory, 1x the trained parameters) and put back: a run
    does not depend on how often it samples or saves. Training states hold y and are saved outside. No effect for other
    optimizers, nor when it is entered already.
    """
    groups = optimizer.param_groups
    if not _has_two_modes(optimizer) or not all(group.get("train_mode", True) for group in groups):
        yield
        return
    params = [p for group in groups for p in group["params"]]
    kept = [p.detach().to("cpu", copy=True) for p in params]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for param, value in zip(params, kept):
                param.copy_(value)


def evaluated(optimizer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, made within `evaluation_mode(optimizer)`."""

    def within(*arguments: Any) -> Any:
        with evaluation_mode(optimizer):
            return call(*arguments)

    return within

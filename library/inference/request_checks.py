"""Whether the pictures of a run can be drawn, before any of them is."""

from collections.abc import Sequence

from library.diffusion.targets import PredictionType
from library.errors import UserError
from library.inference.highres import first_stage
from library.inference.request import GenRequest
from library.inference.samplers import make_scheduler
from library.inference.stage import check_steps
from library.models.bundle import ModelBundle


def check_strengths_act(requests: Sequence[GenRequest], *, over_pictures: bool = False) -> None:
    """Raise UserError for a strength where nothing is drawn over, and for one that leaves no step.

    over_pictures: all of them are drawn over pictures, which they need not have yet. No model is needed for it.
    """
    for request in requests:
        over = over_pictures or request.image is not None
        if over or request.highres is not None:
            check_steps(request)
        elif request.strength is not None:
            fix = "name image_path, or set highres_fix_scale"
            raise UserError("--t cannot act: nothing is drawn over", request.raw or "strength", fix)
        if over and request.highres is not None:
            check_steps(first_stage(request))


def check_samplers(requests: Sequence[GenRequest], bundle: ModelBundle | None = None) -> None:
    """Raise UserError for a picture that its sampler cannot draw with this model; None: with any."""
    kind: PredictionType = "epsilon" if bundle is None else bundle.prediction_type  # which every sampler can draw
    schedule = None if bundle is None else bundle.schedule
    small = [first_stage(request) for request in requests if request.highres is not None]
    stages = ((request.sampler, request.steps, request.eta) for request in [*requests, *small])
    for sampler, steps, eta in dict.fromkeys(stages):
        make_scheduler(sampler, prediction_type=kind, steps=steps, schedule=schedule, eta=eta)

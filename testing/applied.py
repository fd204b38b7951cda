"""Every node that changes a sampling run, in a form that one loop can apply: a new node is one line of `APPLIED`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..nodes import PriorGuidanceModel, PriorGuidanceScale
from . import host_runs as h


class Run(NamedTuple):
    """What goes into SamplerCustomAdvanced."""

    model: Any
    sampler: Any
    noise: Any


class Applied(NamedTuple):
    """One node in a run. apply(run, quantile): the run with the node in it; quantile None is its neutral setting."""

    apply: Callable[[Run, float | None], Run]
    steers: bool = True  # by the prediction; else by the starting noise


def _half(quantile):
    return 0.5 if quantile is None else quantile


def _prior(node, thing, quantile):
    return h.outputs(node, thing, _half(quantile), 1.0, quantile is not None)[0]


APPLIED = {
    "DensityGuidanceSampler": Applied(lambda run, q: run._replace(sampler=h.guided_sampler(_half(q), sampler=run.sampler))),
    "DensityGuidanceModel": Applied(lambda run, q: run._replace(model=h.guided_model(run.model, _half(q)))),
    "PriorGuidanceScale": Applied(lambda run, q: run._replace(noise=_prior(PriorGuidanceScale, run.noise, q)), steers=False),
    "PriorGuidanceModel": Applied(
        lambda run, q: run._replace(model=h.kept(_prior(PriorGuidanceModel, run.model, q))), steers=False
    ),
}
STEERING = [name for name, applied in APPLIED.items() if applied.steers]

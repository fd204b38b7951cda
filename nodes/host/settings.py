"""What the settings of guidance and of variation have in common: windows of the sampling, and numbers for each image."""

from collections.abc import Sequence
from typing import Any

from ...dg_core.control import GuidedSteps, guided_steps
from ...dg_core.schedule import Schedule
from .inputs import WINDOW


def require_window(start_percent: float, end_percent: float) -> None:
    """Raise ValueError unless both are shares of the sampling, the first smaller than the second."""
    for declared, value in zip(WINDOW, (start_percent, end_percent)):
        declared.check(value)
    if start_percent >= end_percent:
        raise ValueError(
            f"start_percent is {start_percent} and end_percent is {end_percent}; start_percent must be smaller than end_percent"
        )


def require_batch(name: str, values: Sequence[float] | None, batch: int) -> None:
    """Raise ValueError unless `values` is None or has one number, or one for each of `batch` images."""
    if values and len(values) not in (1, batch):
        raise ValueError(
            f"{name} has {len(values)} numbers and the latent has {batch} images; give one number for all, or {batch}"
        )


def repeated(values: Sequence[float], count: int) -> Sequence[float]:
    """A single value `count` times; more are returned as they are."""
    return [values[0]] * count if len(values) == 1 else values


def steps_of_percents(model_sampling: Any, schedule: Schedule, start_percent: float, end_percent: float) -> GuidedSteps | None:
    """The `GuidedSteps` of a schedule between two shares of the model's sampling; None where there are none."""
    return guided_steps(schedule, model_sampling.percent_to_sigma(start_percent), model_sampling.percent_to_sigma(end_percent))

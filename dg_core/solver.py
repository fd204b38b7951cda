"""The pack's own solver of the guided flow: third order, one model call per step.

A step predicts, calls the model once, corrects with that evaluation, moves the evaluation by the correction and corrects again;
see `flow` for the state, and `adams` for the scheme.
"""

import torch

from .control import Steering
from .flow import ORDER, Callback, Denoiser, Flow
from .schedule import Schedule
from .statistics import region_of
from .variation import Variation, jump


def solve(
    model: Denoiser,
    x: torch.Tensor,
    schedule: Schedule,
    control: Steering | None = None,
    noise: Variation | None = None,
    callback: Callback | None = None,
    *,
    mask: torch.Tensor | None = None,
    order: int = ORDER,
    limit_order: bool = True,
) -> torch.Tensor:
    """Integrate the flow of x (B, ...) down a schedule: x at its last sigma, in the host's units.

    model: called once per step, not again where a sigma repeats the one before. control: None is the plain flow.
    noise: added in some steps at an unchanged log-density; its model calls may lie between the noise levels of the schedule.
    callback(i, x, denoised): once for each step, after the model's call at its sigma; x is the corrected state, denoised the
    unguided prediction. A step whose only call lies at a raised noise level reports before it, with what the evaluations so
    far lead to. mask: None, or in [0, 1], broadcastable to x, the share of each element that the model replaces, the rest being
    given (inpainting). order: how many evaluations a prediction of the plain flow interpolates. limit_order: see `adams`.

    A last step to sigma = 0 returns the denoised prediction, unguided.
    """
    region = None if mask is None else region_of(mask)
    levels = schedule.levels
    flow = Flow(schedule, control, mask, order, limit_order)
    u, theta = x / levels[0].scale, levels[0].theta  # the corrected state at the previous node
    denoised, drift = x, torch.zeros_like(x[:1])
    for i, level in enumerate(levels[:-1]):
        raised = noise.raised_levels(schedule, i) if noise is not None else []
        if i and level.sigma == levels[i - 1].sigma:  # the state is still the same, and so is the evaluation
            if callback is not None:
                callback(i, x, denoised)
        elif noise is None or not raised or noise.evaluates_before:
            denoised = model(x, level.sigma)
            flow.add(x, denoised, level, i)
            if i:
                drift = flow.advance(u, theta, level.theta, i - 1, correct=True) * level.scale - x
                flow.move(x, drift, denoised, level, i)
                u = flow.advance(u, theta, level.theta, i - 1, correct=True)
                drift = u * level.scale - x
                x = x + drift
            theta = level.theta
            if callback is not None:
                callback(i, x, denoised)
        else:
            u, theta, drift = x / level.scale, level.theta, torch.zeros_like(x[:1])
            if callback is not None:
                callback(i, x, flow.denoised_at(level.theta))
        if noise is not None:
            for s in raised:
                u, theta, denoised = jump(flow, model, noise, schedule, i, u, theta, s)
        after = levels[i + 1]
        if after.sigma == 0:
            # The prediction was made before the correction: keep its eps and move with the state.
            if region is not None:
                drift = drift * region
            return denoised + drift / level.alpha if level.alpha > 0 else denoised
        if after.sigma < level.sigma:
            x = flow.advance(u, theta, after.theta, i) * after.scale
    return x

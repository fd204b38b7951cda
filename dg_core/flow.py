"""The guided flow, as known from the evaluations along a path.

The state is the variance-preserving one, u = x / sqrt(alpha^2 + std^2), and the clock theta = atan(s), which is regular at
both ends of a schedule (s = 0, and s = infinity where a flow model has sigma = 1):

    du = (cos(theta) eps - sin(theta) denoised) dtheta + g dln(s),      g = sin(theta) (eta - 1) eps

eps and denoised are smooth in theta, and constant wherever the noise or the image rules; the guidance g is singular in theta,
but smooth against ln(s). Each is a `History` of `adams`.

Source of the flow: arXiv 2502.05807, section 5. State, clock and the split of the measures: derived here.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from .adams import SHARES, SHARES_AFTER_EXTRAPOLATION, History, limited_sum, whole_sum
from .control import Steering
from .quadrature import denoised_weights, eps_weights, guidance_weights
from .schedule import Level, Schedule
from .statistics import per_image, region_of, squared_norm

ORDER = 3
# The share of a correction that denoised follows. A step's error lies where the denoiser turns from "all noise", 0, to "all
# image", 1, and so in the middle.
TURNING = 0.5


class Denoiser(Protocol):
    """A model's prediction: x (B, ...) at the noise level sigma -> denoised (B, ...), both in the host's units."""

    def __call__(self, x: torch.Tensor, sigma: float, /) -> torch.Tensor: ...


# callback(i, x, denoised), once for each step
Callback = Callable[[int, torch.Tensor, torch.Tensor], None]


class Flow:
    """The guided flow, as known from the evaluations so far."""

    def __init__(
        self,
        schedule: Schedule,
        control: Steering | None = None,
        mask: torch.Tensor | None = None,
        order: int = ORDER,
        limit_order: bool = True,
    ):
        """See `solver.solve`."""
        self._control = control
        self._region = None if mask is None else region_of(mask)
        self._limit_order, self._shares = limit_order, SHARES
        weights = None if control is None else control.weights
        self._amount = mask if weights is None else weights if mask is None else weights * mask
        self._schedule = schedule
        self._eps = History(eps_weights, order)
        self._denoised = History(denoised_weights, order)
        self._guidance = History(guidance_weights, 1 if control is None else control.nodes)

    def add(self, x: torch.Tensor, denoised: torch.Tensor, level: Level, step: int) -> None:
        """Add an evaluation of x at `level`, made in `step`: at its start, or at a noise level raised above it."""
        self._add(x, denoised, level, step, History.add)

    def move(self, x: torch.Tensor, drift: torch.Tensor, denoised: torch.Tensor, level: Level, step: int) -> None:
        """Replace the last evaluation, of x, by an estimate at x + drift, without a call; see `TURNING`.

        Not in the first steps, of a lower order, whose errors lie elsewhere too.
        """
        if level.alpha > 0 and self._eps.nodes >= ORDER:
            moved = torch.add(denoised, drift, alpha=TURNING / level.alpha)
            self._add(x + drift, moved, level, step, History.replace)

    def add_after_jump(self, x: torch.Tensor, denoised: torch.Tensor, level: Level, step: int, extrapolated: bool) -> None:
        """Add an evaluation of a state that has jumped; extrapolated: from a foot that no evaluation has seen."""
        if extrapolated:
            self._shares = SHARES_AFTER_EXTRAPOLATION
        self._add(x, denoised, level, step, partial(History.add_after_jump, once=extrapolated))

    def _add(self, x: torch.Tensor, denoised: torch.Tensor, level: Level, step: int, put: Callable[..., None]) -> None:
        next_theta = self._schedule.next_theta(step)
        eps = level.eps(x, denoised)
        put(self._eps, level.theta, eps, next_theta)
        put(self._denoised, level.theta, denoised, next_theta)
        control = self._control
        if control is not None and control.steps.first <= step <= control.steps.last and level.alpha > 0:
            eps_norm2 = squared_norm(eps, control.weights)
            eta = control.eta_minus_one(eps_norm2, torch.full_like(eps_norm2, level.s))
            guidance = eps * per_image(math.sin(level.theta) * eta, x.ndim)
            put(self._guidance, level.theta, guidance if self._amount is None else guidance * self._amount, next_theta)

    def advance(self, u: torch.Tensor, theta_from: float, theta_to: float, step: int, correct: bool = False) -> torch.Tensor:
        """The state u (B, ...) at theta_from, taken to theta_to during `step`."""
        terms = zip(
            self._eps.terms(theta_from, theta_to, correct), self._denoised.terms(theta_from, theta_to, correct), strict=True
        )
        u = u + (limited_sum(terms, self._region, self._shares) if self._limit_order else whole_sum(terms))
        return self.guide(u, theta_from, theta_to, step, correct)

    def guide(self, u: torch.Tensor, theta_from: float, theta_to: float, step: int, correct: bool = False) -> torch.Tensor:
        """u (B, ...) plus what guidance adds to it from theta_from to theta_to, as far as it is known."""
        if self._control is not None and self._control.steps.first <= step < self._control.steps.last:
            u = u + sum(self._guidance.terms(theta_from, theta_to, correct), start=torch.zeros(()))
        return u

    @property
    def has_guidance(self) -> bool:
        """Whether there was an evaluation in the guided steps."""
        return self._guidance.nodes > 0

    def eps_at(self, theta: float) -> torch.Tensor:
        """The eps (B, ...) that the path leads to at theta."""
        return self._eps.at(theta)

    def denoised_at(self, theta: float) -> torch.Tensor:
        """The denoised prediction (B, ...) that the path leads to at theta."""
        return self._denoised.at(theta)

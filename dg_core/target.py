"""Explicit control: runs that end at a wanted log-density.

A run is tracked (`LogDensityTrack`), and steered in closed loop: at every step the gap between the wanted end and what is
to be expected is spread over the ln s that remains, as the reference's ||eps||^2 allows,

    eta - 1 = (target - log p - rest) / (integral of ||eps||^2 dln(s) to the end)

with `rest` the change of log p from here to the end in the reference, a run of the same noise without guidance. So the
rate b of log p is the density's own plus eta - 1 times what eps can do, and eta hardly changes along the run; a constant gain
would ask for much at the end of an image, where little noise is left. The loop ends at the target to about one step's
change of eta; the next pass moves the aim by the secant rule where that was not enough.

symbol     name       unit
target     target     nats of u, see `log_density`
Source of explicit control: arXiv 2502.05807, section 5; rate and loop: derived here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .control import GuidedSteps
from .log_density import Evaluate, LogDensityTrack
from .schedule import Schedule
from .solver import solve
from .statistics import per_image

# |eta - 1| beyond which a step is no small change of the flow any more.
STRONGEST = 0.5


@dataclass(frozen=True)
class Run:
    """One pass: x at the end; log p_u after each evaluation, by s; at the end: its value and variance, (B,)."""

    x: torch.Tensor
    log_prob: dict[float, torch.Tensor]
    end: torch.Tensor
    variance: torch.Tensor
    track: LogDensityTrack

    def room(self) -> dict[float, torch.Tensor]:
        """{s: integral of ||eps||^2 dln(s) from there to the end, (B,)}, by the trapezoid rule, for finite s."""
        s, energy = self.track.s, self.track.eps_energy
        total, room = torch.zeros(()), {}
        for i in range(len(s) - 2, -1, -1):
            if math.isinf(s[i]):
                break
            total = total + math.log(s[i] / s[i + 1]) * (energy[i] + energy[i + 1]) / 2 * self.track.dim
            room[s[i]] = total
        return room


@dataclass(frozen=True)
class Feedback:
    """`Steering` towards a target: eta - 1 from where the run is now, whatever its eps.

    track, log_prob: of the run, up to date when a step asks. target: (B,), nats of u. reference: the unguided `Run`; room: its.
    """

    steps: GuidedSteps
    track: LogDensityTrack
    log_prob: dict[float, torch.Tensor]
    target: torch.Tensor
    reference: Run
    room: dict[float, torch.Tensor]
    weights: torch.Tensor | None = None

    def eta_minus_one(self, eps_norm2: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """eta - 1 of every image at the last evaluation of the run, (B,); 0 at the end."""
        here = self.track.s[-1]
        if here not in self.room:
            return torch.zeros_like(eps_norm2)
        rest = self.reference.end - self.reference.log_prob[here]
        return ((self.target - self.log_prob[here] - rest) / self.room[here]).clamp(-STRONGEST, STRONGEST).to(eps_norm2)


class TrackedRuns:
    """Runs from one noise down one schedule, whose log-density is tracked.

    new_evaluate() -> an `Evaluate` for a new pass (the same probes each time, so that passes are comparable). x: (B, ...) at
    the first sigma. start: (log p_u of x there, its error), (B,). steps: those that are guided. callback(done, x, denoised):
    after the `done`-th evaluation.
    """

    def __init__(
        self,
        new_evaluate: Callable[[], Evaluate],
        x: torch.Tensor,
        schedule: Schedule,
        steps: GuidedSteps,
        start: tuple[torch.Tensor, torch.Tensor],
        callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    ):
        self._new_evaluate, self._x, self._schedule, self._steps = new_evaluate, x, schedule, steps
        self._start, self._start_error = start
        self._callback = callback
        self._done = 0
        self.dim = x[0].numel()
        self._last = [level for level in schedule.levels if level.sigma > 0][-1]

    @property
    def s_end(self) -> float:
        """The last noise level above 0."""
        return self._last.s

    def run(self, target: torch.Tensor | None = None, reference: Run | None = None) -> Run:
        """A `Run` in closed loop to `target` (B,), as seen from `reference`; unguided without them."""
        evaluate, track = self._new_evaluate(), LogDensityTrack(self._schedule.path, self.dim)
        log_prob: dict[float, torch.Tensor] = {}

        def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
            evaluation = evaluate(x, sigma, len(track.s))
            track.add(x, sigma, evaluation)
            log_prob[track.s[-1]] = self._start + track.change
            self._done += 1
            if self._callback is not None:
                self._callback(self._done, x, evaluation.denoised)
            return evaluation.denoised

        control = None
        if target is not None and reference is not None:
            control = Feedback(self._steps, track, log_prob, target, reference, reference.room())
        x = solve(model, self._x, self._schedule, control)
        if self._schedule.sigmas[-1] > 0:
            model(x, self._last.sigma)
        return Run(x, log_prob, log_prob[self.s_end], track.variance + self._start_error**2, track)


@dataclass(frozen=True)
class Reached:
    """x (B, ...); target, achieved and its standard error, (B,), nats of u; passes: how many were guided."""

    x: torch.Tensor
    target: torch.Tensor
    achieved: torch.Tensor
    standard_error: torch.Tensor
    unguided: torch.Tensor
    passes: int
    last: Run  # the last pass, whose x need not be the one kept


def reach(runs: TrackedRuns, target_of: Callable[[torch.Tensor], torch.Tensor], tolerance: float, max_passes: int) -> Reached:
    """Guided runs, at most `max_passes`, until every image's tracked end is within `tolerance` nats of its target.

    target_of(unguided) -> target: from the ends (B,) of the reference, one unguided run. Every image keeps the first pass
    within tolerance, whatever the others of the batch still need, or else the one that came nearest. After a miss the
    aim moves by miss / slope, with the slope of end against aim from the last two passes.
    """
    reference = runs.run()
    target = target_of(reference.end)
    last, gap = reference, (reference.end - target).abs()
    x, achieved, variance = reference.x, reference.end, reference.variance
    aims, ends, passes = [reference.end], [reference.end], 0
    aim = target
    while passes < max_passes and bool((gap > tolerance).any()):
        last = runs.run(aim, reference)
        passes += 1
        aims.append(aim)
        ends.append(last.end)
        better = (gap > tolerance) & ((last.end - target).abs() < gap)
        x = torch.where(per_image(better, x.ndim), last.x, x)
        achieved, variance = torch.where(better, last.end, achieved), torch.where(better, last.variance, variance)
        gap = (achieved - target).abs()
        moved = aims[-1] - aims[-2]
        slope = torch.where(moved == 0, 1.0, (ends[-1] - ends[-2]) / torch.where(moved == 0, 1.0, moved)).clamp(0.3, 3.0)
        aim = aim + (target - last.end) / slope
    return Reached(x, target, achieved, variance.sqrt(), reference.end, passes, last)

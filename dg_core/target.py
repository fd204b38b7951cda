"""Explicit control: runs that end at a wanted log-density.

What control adds early decides what the model itself does later, and the model amplifies it, for each image by another factor.
So the first runs only measure. Their log-densities (`LogDensityTrack`) give the path of the next run, kept on it by feedback.

* Reference: no guidance. First pass: a constant eta - 1, with which control itself adds 1 / `AMPLIFICATION` of the change.
* Every further pass: take the two runs so far whose ends lie nearest around the target, and interpolate their controls and
  their log p at each noise level to it: the aim. A run that is off the aim is brought back in the next steps,

      eta - 1 = (eta - 1)_aim + (log p_aim - log p) / (integral of ||eps||^2 dln(s) over the next `HORIZON` steps),

  and near the end nothing is amplified any more: what remains is what the last step alone cannot correct.

symbol     name       unit
target     target     nats of u, see `log_density`
Source of explicit control: arXiv 2502.05807, section 5; passes and loop: derived here.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .control import GuidedSteps
from .log_density import Denoiser, Evaluate, Evaluation, LogDensityTrack, cos_log, read_log_density
from .schedule import Schedule
from .solver import solve

# |eta - 1| beyond which a step is no small change of the flow any more.
STRONGEST = 0.5
# Change of the log-density over what control itself adds: 1 where the Jacobian is the same everywhere, several where not.
AMPLIFICATION = 4.0
# With 3 or fewer the loop oscillates where few steps decide; with 7 it converges on textures and on emojis.
HORIZON = 7
# How far beyond two runs a target may lie, in units of their distance.
_FARTHEST = 5.0


@dataclass(frozen=True)
class Run:
    """One pass: x at the end; eta - 1 and log p_u at each evaluation, by s; end, variance: log p_u at the last, (B,).

    state: the one at the last evaluation, (B, ...).
    """

    x: torch.Tensor
    eta: dict[float, torch.Tensor]
    log_prob: dict[float, torch.Tensor]
    end: torch.Tensor
    variance: torch.Tensor
    track: LogDensityTrack
    state: torch.Tensor

    def room(self, steps: int | None = None) -> dict[float, torch.Tensor]:
        """{s: integral of ||eps||^2 dln(s) over the next `steps`, None: all, (B,)}, by the trapezoid rule, for finite s."""
        first = 1 if math.isinf(self.track.s[0]) else 0
        s, energy = self.track.s[first:], self.track.eps_energy[first:]
        parts = [
            math.log(a / b) * (e + f) / 2 * self.track.dim for (a, e), (b, f) in itertools.pairwise(zip(s, energy, strict=True))
        ]
        return {a: torch.stack(parts[i : None if steps is None else i + steps]).sum(0) for i, a in enumerate(s[:-1])}


@dataclass(frozen=True)
class Aim:
    """What a pass follows: eta - 1 and log p_u by s, and the integral that a correction is divided by (`room`); each (B,)."""

    eta: dict[float, torch.Tensor]
    log_prob: dict[float, torch.Tensor]
    room: dict[float, torch.Tensor]


def first_aim(reference: Run, target: torch.Tensor) -> Aim:
    """A constant eta - 1, without feedback: the change that it makes in log p is not known yet."""
    room = reference.room()
    whole = max(room)
    eta = ((target - reference.end) / AMPLIFICATION / room[whole]).clamp(-STRONGEST, STRONGEST)
    return Aim({s: eta for s in room}, {}, room)


def next_aim(runs: Sequence[Run], target: torch.Tensor) -> Aim:
    """The path to the target (B,), interpolated or extrapolated from the two runs so far that end nearest around it."""
    ends = torch.stack([run.end for run in runs])
    gap = ends - target
    below = torch.where(gap <= 0, gap, -math.inf).max(0)
    above = torch.where(gap > 0, gap, math.inf).min(0)
    nearest = gap.abs().topk(2, 0, largest=False).indices
    bracketed = below.values.isfinite() & above.values.isfinite()
    low, high = torch.where(bracketed, below.indices, nearest[0]), torch.where(bracketed, above.indices, nearest[1])

    def chosen(values: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.stack(list(values))
        return rows.gather(0, low[None])[0], rows.gather(0, high[None])[0]

    a, b = chosen(ends)
    share = torch.where(a == b, 0.0, (target - a) / torch.where(a == b, 1.0, b - a)).clamp(-_FARTHEST, 1 + _FARTHEST)

    def between(values: Sequence[torch.Tensor]) -> torch.Tensor:
        a, b = chosen(values)
        return a + share * (b - a)

    rooms = [run.room(HORIZON) for run in runs]
    return Aim(
        {s: between([run.eta[s] for run in runs]) for s in rooms[0]},
        {s: between([run.log_prob[s] for run in runs]) for s in runs[0].log_prob},
        {s: between([room[s] for room in rooms]).clamp_min(1e-6) for s in rooms[0]},
    )


@dataclass(frozen=True)
class Feedback:
    """`Steering` along an `Aim`: eta - 1 from the log-density of the run so far.

    track, log_prob: of the run, up to date when a step asks. eta: gets the values of eta - 1 that were used, by s.
    """

    steps: GuidedSteps
    track: LogDensityTrack
    log_prob: dict[float, torch.Tensor]
    aim: Aim
    eta: dict[float, torch.Tensor]
    weights: torch.Tensor | None = None
    nodes: ClassVar[int] = 1

    def eta_minus_one(self, eps_norm2: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """eta - 1 of every image at the last evaluation of the run, (B,); 0 at the end."""
        here, aim = self.track.s[-1], self.aim
        if here not in aim.eta:
            return torch.zeros_like(eps_norm2)
        eta = aim.eta[here]
        if aim.log_prob:
            eta = eta + (aim.log_prob[here] - self.log_prob[here]) / aim.room[here]
        eta = eta.clamp(-STRONGEST, STRONGEST).to(eps_norm2)
        self.eta[here] = eta
        return eta


class TrackedRuns:
    """Runs from one noise down one schedule, whose log-density is tracked.

    new_evaluate() -> an `Evaluate` for a new pass (the same probes each time, so that passes are comparable). predict(x, sigma)
    -> denoised. x: (B, ...) at the first sigma. start: (log p_u of x there, its error), (B,). steps: those that are guided.
    callback(done, x, denoised): after the `done`-th evaluation.
    """

    def __init__(
        self,
        new_evaluate: Callable[[], Evaluate],
        predict: Denoiser,
        x: torch.Tensor,
        schedule: Schedule,
        steps: GuidedSteps,
        start: tuple[torch.Tensor, torch.Tensor],
        callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    ):
        self._new_evaluate, self._predict = new_evaluate, predict
        self._x, self._schedule, self._steps = x, schedule, steps
        self._start, self._start_error = start
        self._callback = callback
        self._done = 0
        self.dim = x[0].numel()
        self._last = [level for level in schedule.levels if level.sigma > 0][-1]

    @property
    def s_end(self) -> float:
        """The last noise level above 0."""
        return self._last.s

    def run(self, aim: Aim | None = None) -> Run:
        """A `Run` after an aim; unguided without one."""
        evaluate, track = self._reported(), LogDensityTrack(self._schedule.path, self.dim)
        log_prob: dict[float, torch.Tensor] = {}
        eta: dict[float, torch.Tensor] = {}
        state = self._x

        def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
            nonlocal state
            evaluation = evaluate(x, sigma, len(track.s))
            track.add(x, sigma, evaluation)
            log_prob[track.s[-1]] = self._start + track.change
            eta[track.s[-1]] = torch.zeros_like(self._start)
            if sigma == self._last.sigma:
                state = x.clone()
            return evaluation.denoised

        control = None if aim is None else Feedback(self._steps, track, log_prob, aim, eta)
        x = solve(model, self._x, self._schedule, control)
        if self._schedule.sigmas[-1] > 0:
            model(x, self._last.sigma)
        return Run(x, eta, log_prob, log_prob[self.s_end], track.error**2 + self._start_error**2, track, state)

    def read(self, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        """(log p_u of the last state of a run, its standard error), (B,), by the flow up the same noise levels."""
        levels = [level.s for level in reversed(self._schedule.levels) if level.sigma > 0]
        found = read_log_density(self._reported(), self._predict, run.state / self._last.alpha, levels, self._schedule.path)
        return found.log_prob - self.dim * cos_log(self.s_end), found.standard_error

    def _reported(self) -> Evaluate:
        """A new `Evaluate` that tells the callback."""
        evaluate = self._new_evaluate()

        def reported(x: torch.Tensor, sigma: float, call: int) -> Evaluation:
            evaluation = evaluate(x, sigma, call)
            self._done += 1
            if self._callback is not None:
                self._callback(self._done, x, evaluation.denoised)
            return evaluation

        return reported


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
    """Guided runs, at most `max_passes`, until every image's end is within `tolerance` nats of its target.

    target_of(unguided) -> target: from the ends (B,) of the reference, one unguided run. Every image keeps the first pass
    within tolerance, whatever the others of the batch still need, or else the one that came nearest.
    """
    reference = runs.run()
    target = target_of(reference.end)
    done, read = [reference], Correction.none(reference.end)
    while True:
        corrected = [replace(run, end=read.end(run.end)) for run in done]
        gaps = torch.stack([(run.end - target).abs() for run in corrected])
        within = gaps <= tolerance
        if bool((new := ~read.known & (within[-1] | (len(done) == max_passes))).any()) and len(done) > 1:
            read = read.updated(new, done[-1].end, *runs.read(done[-1]))
            continue
        first = (within.cumsum(0) == 0).sum(0)
        chosen = torch.where(first < len(done), first, gaps.nan_to_num(math.inf).argmin(0))
        if len(done) > max_passes or not bool((gaps.gather(0, chosen[None])[0] > tolerance).any()):
            break
        done.append(runs.run(first_aim(reference, target) if len(done) == 1 else next_aim(corrected, target)))

    def kept(values: Iterable[torch.Tensor]) -> torch.Tensor:
        rows = torch.stack(list(values))
        return rows[chosen, torch.arange(len(chosen), device=rows.device)]

    variance = torch.where(read.offset != 0, read.variance, kept(run.variance for run in done))
    return Reached(
        kept(run.x for run in done),
        target,
        kept(run.end for run in corrected),
        variance.sqrt(),
        reference.end,
        len(done) - 1,
        done[-1],
    )


@dataclass(frozen=True)
class Correction:
    """What was read at the end of one guided pass, less what was tracked, (B,).

    unguided, at: tracked ends of the reference and of the pass that was read. known: where one was.
    """

    unguided: torch.Tensor
    at: torch.Tensor
    offset: torch.Tensor
    variance: torch.Tensor
    known: torch.Tensor

    @classmethod
    def none(cls, unguided: torch.Tensor) -> "Correction":
        """Before any was read."""
        zero = torch.zeros_like(unguided)
        return cls(unguided, unguided, zero, zero, torch.zeros_like(unguided, dtype=torch.bool))

    def updated(self, new: torch.Tensor, at: torch.Tensor, log_prob: torch.Tensor, error: torch.Tensor) -> "Correction":
        """With what was read of the images `new`, where it differs by more than its error explains."""
        offset = torch.where((log_prob - at).abs() > 2 * error, log_prob - at, 0.0)
        return Correction(
            self.unguided,
            torch.where(new, at, self.at),
            torch.where(new, offset, self.offset),
            torch.where(new, error**2, self.variance),
            self.known | new,
        )

    def end(self, tracked: torch.Tensor) -> torch.Tensor:
        """Log p_u (B,) of a pass that was tracked to `tracked`; the difference grows with what guidance changed."""
        whole = self.at - self.unguided
        share = torch.where(whole == 0, 0.0, (tracked - self.unguided) / torch.where(whole == 0, 1.0, whole)).clamp(0, 2)
        return tracked + share * self.offset

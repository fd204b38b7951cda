"""Explicit control: runs that end at a wanted log-density.

A run is tracked (`LogDensityTrack`), and steered in closed loop: at every step the gap between the wanted end and what is
to be expected is spread over the ln s that remains, as the reference's ||eps||^2 allows,

    eta = 1 + k / ||eps||^2,      k = (target - log p - rest) ||eps||^2 / (integral of ||eps||^2 dln(s) to the end)

with `rest` the change of log p from here to the end in the reference, a run of the same noise without guidance. So the
rate b of log p is the density's own plus eta - 1 times what eps can do, and eta hardly changes along the run; a constant k
would ask for much at the end of a picture, where little noise is left. The loop ends at the target to about one step's
change of k; the next pass moves the aim by the secant rule where that was not enough.

symbol     name       unit
k          -          nats per unit of -ln s; k = sqrt(2 D) z in the terms of `control`
target     target     nats of u, see `log_density`
Source of explicit control: arXiv 2502.05807, section 5; rate and loop: derived here.
"""

import math
from dataclasses import dataclass

import torch

from .log_density import LogDensityTrack
from .solver import solve

# |eta - 1| beyond which a step is no small change of the flow any more.
STRONGEST = 0.5


@dataclass(frozen=True)
class Run:
    """One pass: x at the end; log p_u after each model call, by sigma; at the end: its value and variance, (B,)."""

    x: torch.Tensor
    log_prob: dict
    end: torch.Tensor
    variance: torch.Tensor
    track: LogDensityTrack

    def room(self):
        """{sigma: integral of ||eps||^2 dln(s) from there to the end, (B,)}, by the trapezoid rule, for finite s."""
        s, energy = self.track.s, self.track.eps_energy
        total, room = 0.0, {}
        for i in range(len(s) - 2, -1, -1):
            if math.isinf(s[i]):
                break
            total = total + math.log(s[i] / s[i + 1]) * (energy[i] + energy[i + 1]) / 2 * self.track.dim
            room[self.sigmas[i]] = total
        return room

    @property
    def sigmas(self):
        return list(self.log_prob)


class TrackedRuns:
    """Runs from one noise down one schedule, whose log-density is tracked.

    look(x, sigma, call) -> `Sight`; look_anew() -> such a function, for a new pass (the same probes each time, so that
    passes are comparable). start: (log p_u of x at the first sigma, its error), (B,). sigmas, coordinates, guided: as in
    `solver.solve`. callback(done, x, denoised): after the `done`-th call.
    """

    def __init__(self, look_anew, x, sigmas, coordinates, guided, start, callback=None):
        self._look_anew, self._x, self._sigmas = look_anew, x, sigmas
        self._coordinates, self._guided = coordinates, guided
        self._start, self._start_error = start
        self._callback = callback
        self._done = 0
        self.dim = x[0].numel()
        self.s_end = coordinates.s([v for v in sigmas if v > 0][-1])

    def run(self, target=None, reference=None):
        """A `Run` in closed loop to `target` (B,); unguided without."""
        look, track, log_prob = self._look_anew(), LogDensityTrack(self.dim), {}
        room = {} if reference is None else reference.room()

        def see(x, sigma):
            sight = look(x, sigma, len(track.s))
            track.add(x, sigma, self._coordinates.alpha(sigma), sight)
            log_prob[sigma] = self._start + track.change
            self._done += 1
            if self._callback is not None:
                self._callback(self._done, x, sight.denoised)
            return sight.denoised

        def steer(step):
            sigma = self._sigmas[step]
            if sigma not in room:  # the end
                return torch.zeros_like(target)
            rest = reference.end - reference.log_prob[sigma]
            eta_less_one = ((target - log_prob[sigma] - rest) / room[sigma]).clamp(-STRONGEST, STRONGEST)
            return eta_less_one * track.eps_energy[-1] * (self.dim / 2) ** 0.5

        x = solve(see, self._x, self._sigmas, self._coordinates, self._guided, 0.0 if target is None else steer, self.dim)
        if self._sigmas[-1] > 0:
            see(x, self._sigmas[-1])
        last = [v for v in self._sigmas if v > 0][-1]
        return Run(x, log_prob, log_prob[last], track.variance + self._start_error**2, track)


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


def reach(runs, target_of, tolerance, max_passes):
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
        x = torch.where(better.view(-1, *[1] * (x.ndim - 1)), last.x, x)
        achieved, variance = torch.where(better, last.end, achieved), torch.where(better, last.variance, variance)
        gap = (achieved - target).abs()
        moved = aims[-1] - aims[-2]
        slope = torch.where(moved == 0, 1.0, (ends[-1] - ends[-2]) / torch.where(moved == 0, 1.0, moved)).clamp(0.3, 3.0)
        aim = aim + (target - last.end) / slope
    return Reached(x, target, achieved, variance.sqrt(), reference.end, passes, last)

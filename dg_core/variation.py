"""Variation: noise that keeps the log-density.

Noise orthogonal to the score does not change log p to first order (arXiv 2502.05807, section 6). A step of the
Euler-Maruyama scheme leaves the level set at second order, and its bias falls only with the step. Here a step from s to
s' < s first jumps to a raised noise level, where the model is called, and then follows the deterministic flow down:

    s_up^2 = s^2 + r^2,     r^2 = c^2 (s^2 - s'^2)              noise of variance r^2 raises the level by as much
    foot   = the flow from (y, s) up to s_up                   its log-density is that of y, by definition
    top    = y + r P xi,    P = I - eps eps^T / ||eps||^2       eps that of the foot
    top'   = top + a eps_top,   a = -<eps_foot + eps_top, top - foot> / (2 ||eps_top||^2)   (to first order, and bounded)

The trapezoid rule gives log p(top) - log p(foot) = -<eps_foot + eps_top, top - foot> / (2 s_up), exactly where the
density is Gaussian; a is the step along the score that undoes it. <P xi, eps_top - eps_foot> is r times Hutchinson's
estimate of tr(P J P) with the noise itself as the probe, so that the second-order change of this very noise is
undone, not that of an average one; the projection carries the term -<eps, J eps> / ||eps||^2 of the trace along.
The scheme is derived here.

correction    eps at the foot is                                           model calls of a step with noise
expected      what the flow so far leads to; every second step has noise   1, as without
hutchinson    the same, after a call at (y, s)                             1 + probes
exact         called for                                                   1 + 2 probes

symbol     name           unit
c          strength       1; noise relative to the reverse SDE's
r          -              noise level, as s
xi         noise          1; standard normal
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .control import GuidedSteps
from .flow import Denoiser, Flow
from .random_numbers import generator_of
from .schedule import Schedule
from .statistics import inner
from .units import require_number, require_whole

# name -> (an evaluation at the state before the noise; one at the foot of every piece of noise)
CORRECTIONS = {"expected": (False, False), "hutchinson": (True, False), "exact": (True, True)}
MAX_STRENGTH = 3.0
MAX_PROBES = 16
_LARGEST_SHARE = 0.5  # see `level_set_step`; 20 steps and more stay below 0.1 (tests/test_stiff_flows.py)
_TINY = 1e-30  # keeps 0 / 0 at 0
_SALT = 0x5EED_0F_DE7A11  # keeps the noise apart from that of other uses of the same seed


@dataclass(frozen=True)
class Variation:
    """Noise in some steps of a run. Raises ValueError, naming the input, where one is out of range.

    steps: those that get noise. strength: c. noise(like): the next standard normal noise, of the shape, dtype and device of
    `like`. correction: one of `CORRECTIONS`. probes: pieces into which "hutchinson" and "exact" cut the noise of a step, each
    with a projection and a correction of its own. amount: None, or the weight in [0, 1] of the noise at each element,
    broadcastable.
    """

    steps: GuidedSteps
    strength: float
    noise: Callable[[torch.Tensor], torch.Tensor]
    correction: str = "expected"
    probes: int = 1
    amount: torch.Tensor | None = None

    def __post_init__(self) -> None:
        require_number("strength", self.strength, 0.0, MAX_STRENGTH)
        if self.correction not in CORRECTIONS:
            raise ValueError(f"correction is {self.correction!r}; it must be one of {', '.join(CORRECTIONS)}")
        require_whole("probes", self.probes, 1, MAX_PROBES)

    @property
    def evaluates_before(self) -> bool:
        """Whether a step with noise begins with an evaluation at the state before it."""
        return CORRECTIONS[self.correction][0]

    @property
    def evaluates_foot(self) -> bool:
        """Whether every piece of noise has an evaluation at its foot."""
        return CORRECTIONS[self.correction][1]

    def raised_levels(self, schedule: Schedule, step: int) -> list[float]:
        """The noise levels s to which a step of the schedule is raised, one for each piece; [] without noise.

        Nothing is raised above the first level of the schedule, since models know no other: the first step has no noise.
        """
        if not (self.strength and self.steps.first <= step < self.steps.last):
            return []
        # Without an evaluation before the noise, every second step goes without, to see where the flow leads.
        stride = 1 if self.evaluates_before else 2
        if (step - max(self.steps.first, 1)) % stride:
            return []
        stop = min(step + stride, self.steps.last)
        s, s_next, s_first = (schedule.levels[i].s for i in (step, stop, 0))
        variance = min(self.strength**2 * (s**2 - s_next**2), s_first**2 - s**2)
        if not variance > 0:
            return []
        pieces = self.probes if self.evaluates_before else 1
        return [math.sqrt(s**2 + variance * (k + 1) / pieces) for k in range(pieces)]


def jump(
    flow: Flow, model: Denoiser, variation: Variation, schedule: Schedule, step: int, u: torch.Tensor, theta: float, s: float
) -> tuple[torch.Tensor, float, torch.Tensor]:
    """From the state u (B, ...) at theta to the noise level s above it, by noise: (u, theta, denoised) there.

    flow: the `Flow` of the run, which gets the new evaluations.
    """
    level = schedule.path.at(schedule.path.sigma(s))
    raised = math.atan(s)
    had_guidance = flow.has_guidance
    foot = flow.advance(u, theta, raised, step)
    if variation.evaluates_foot:
        flow.add(foot * level.scale, model(foot * level.scale, level.sigma), level, step)
    eps = flow.eps_at(raised)
    change = displacement(u, foot, eps, theta, raised, variation.noise(u), variation.amount)
    x = (foot + change) * level.scale
    denoised = model(x, level.sigma)
    u, eps = level_set_step(foot, change, eps, level.eps(x, denoised), variation.amount)
    flow.add_after_jump(
        u * level.scale, (u * level.scale - level.std * eps) / level.alpha, level, step, not variation.evaluates_before
    )
    if not had_guidance:  # after pure noise, which is not guided, the way up could not be, and the way down will be
        u = flow.guide(u, theta, raised, step)
    return u, raised, denoised


def displacement(
    u: torch.Tensor,
    foot: torch.Tensor,
    eps: torch.Tensor,
    theta: float,
    raised: float,
    noise: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """From the foot to the top, in the units of the variance-preserving state u = y cos(theta); shape of u.

    u: the state at theta before the jump. foot, eps: the flow's state and eps at `raised`. noise: xi. weight: None, or the
    weight w in [0, 1] of the noise at each element. Noise of w r lifts an element from sqrt(s_up^2 - w^2 r^2) only: it
    follows the flow to that level first, on the straight line from y to the foot (derived here).
    """
    s_up, s = math.tan(raised), math.tan(theta)
    variance = s_up**2 - s**2
    across = noise - inner(noise, eps, weight) / inner(eps, eps, weight).clamp_min(_TINY) * eps
    rise = math.sqrt(variance) * math.cos(raised) * across
    back = math.cos(raised) / math.cos(theta) * u - foot
    if weight is None:
        return rise + back
    share = weight.square()  # of the way back from the foot to y, but for the last factor
    return rise * weight + back * share * (s_up + s) / (s_up + (s_up**2 - variance * share).sqrt())


def level_set_step(
    foot: torch.Tensor, change: torch.Tensor, eps_foot: torch.Tensor, eps_top: torch.Tensor, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(top', eps there): the top stepped along the score to the log-density of the foot; shape of u.

    change: top - foot, both in the units of u. weight: as in `displacement`.

    The step a eps_top solves a + k a^2 / 2 = a_1 to second order, with a_1 the step of the trapezoid rule and k = <eps_top -
    eps_foot, change> / ||change||^2: how eps changes along the change, taken for how it changes along eps (derived here).

    With few steps at a high CFG foot and top lie so far apart that the expansion fails. So
    ||a_1 eps_top|| is at most `_LARGEST_SHARE` of ||change||, and |k a_1| at most `_LARGEST_SHARE`.
    """
    change_norm2, eps_norm2 = inner(change, change), inner(eps_top, eps_top, weight).clamp_min(_TINY)
    limit = _LARGEST_SHARE * (change_norm2 / eps_norm2).sqrt()
    a_1 = (-inner(eps_foot + eps_top, change) / (2 * eps_norm2)).clamp(-limit, limit)
    k_a = a_1 * inner(eps_top - eps_foot, change) / change_norm2.clamp_min(_TINY)
    k_a = k_a.clamp(-_LARGEST_SHARE, _LARGEST_SHARE)
    direction = (1 - k_a / 2) * (eps_top if weight is None else eps_top * weight)
    return foot + change + a_1 * direction, eps_top + k_a * direction


def indices_of(starting_noise: torch.Tensor) -> list[int]:
    """An index for each image of a batch (B, ...), from the noise that it starts from: the same in every batch.

    Images that share their noise are told apart by their order.
    """
    indices: list[int] = []
    seen: Counter[bytes] = Counter()
    for image in starting_noise:
        content = image.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        digest = hashlib.blake2b(content, digest_size=8).digest()
        seen[digest] += 1
        indices.append(int.from_bytes(digest, "big") + seen[digest])
    return indices


class ImageNoise:
    """Standard normal noise, one generator for each image.

    The noise of an image depends on (seed, its index) and on how often it was asked for, never on the batch. It is drawn
    on the CPU in float32, so that it is the same on every device.
    """

    def __init__(self, seed: int, indices: Sequence[float]):
        """seed: int. indices: one int for each image."""
        self._generators = [generator_of(_SALT, seed, index) for index in indices]

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False):
            images = [torch.randn(like.shape[1:], generator=g) for g in self._generators]
            return torch.stack(images).to(like)

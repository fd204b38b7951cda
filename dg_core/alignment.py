"""Score alignment: does scaling the starting noise change the final log-density, and by how much?

Pushing the prior's score v_T = grad log p_T through the probability-flow ODE gives the tangent v with dv/ds = J v, and

    SA = < grad log p_0(y_0), v_0 >          (arXiv 2502.05807, section on prior guidance):

where SA > 0, less noise at the start means a higher log-density at the end. The computation runs in the
variance-preserving state u = x / sqrt(alpha^2 + std^2) over theta = atan(s), which are regular also where alpha = 0,
and in units of the noise's own scale (derived here):

symbol      name            meaning
n           -               starting noise, u_T = n up to what the host adds to it
w           tangent         change of u per unit of ln(1 / noise scale): w_T = -n
A           alignment       <grad log p_u, w> with grad log p_u = -eps / sin(theta); A = s_T^2 SA, in nats per unit of
                            ln(1 / noise scale), so that log p_0 changes by -A dr / r
cosine      cosine          A / (||grad log p_u|| ||w||), the same in all coordinates
t           curvature       derivative along w of the trace of the denoiser's Jacobian, see `divergence.trace_derivative`

With the score: (u, w) is integrated and A is read off. Without it: d/ds <grad log p, v> = -<grad div eps, v> by the
product rule; the identity part of div eps is constant, which leaves in u, with the derivatives taken by x,

    dA/dtheta = sqrt(alpha^2 + std^2) t / sin(theta),

so that the score is needed at the start only, where it is the prior's (for a flow model exactly so, A = ||n||^2). That is
the alignment with the density of the flow itself, whatever the network computes; "with the score" is the same where eps is
the score of that density, as a trained network's is and one with random weights is not.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.integrate
import torch
from scipy.interpolate import CubicSpline

from . import divergence
from .flow import Callback, Denoiser
from .schedule import Schedule, brief, log_snr
from .solver import solve
from .statistics import sum_dtype
from .units import bits_per_dim_to_nats, nats_to_bits_per_dim

SCALE_RANGE = (0.5, 2.0)
_STRATA = 4
_STABLE_STEP = 0.25  # of ln s


@dataclass(frozen=True)
class Profile:
    """Score alignment along a run: N noise levels, B images, float64 on the CPU, from the start to where it stopped."""

    s: tuple[float, ...]  # (N,), descending; the first may be infinite
    alignment: torch.Tensor  # (N, B), A with the score
    norms: torch.Tensor  # (N, B), ||grad log p_u|| ||w||
    curvature: torch.Tensor | None = None  # (N, B), dA/dtheta of the product rule

    @property
    def log_snr(self) -> list[float]:
        """-2 ln s of every node, (N,); -inf where there is only noise."""
        return [log_snr(s) for s in self.s]

    @property
    def cosine(self) -> torch.Tensor:
        """Cosine of the angle between score and tangent, (N, B)."""
        return self.alignment / self.norms

    @property
    def alignment_without_score(self) -> torch.Tensor:
        """A from the product rule, (N, B): the first A plus the integral of `curvature` over theta.

        Raises ValueError without it.
        """
        if self.curvature is None:
            raise ValueError("curvature is None; trace the alignment with probes")
        rising = np.arctan(self.s)[::-1]
        if len(rising) < 3:
            rate = scipy.integrate.trapezoid(self.curvature.numpy()[::-1], rising, axis=0)
            return torch.stack([self.alignment[0], self.alignment[0] - torch.from_numpy(np.asarray(rate))])
        integral = CubicSpline(rising, self.curvature.numpy()[::-1]).antiderivative()
        return self.alignment[0] - torch.from_numpy(integral(rising[-1]) - integral(rising[::-1]))


class Differentiate:
    """(x, sigma, tangent) -> (denoised, derivative along the tangent, t or None), what `trace_alignment` asks for.

    predict(x, sigma) -> denoised. method, dtype: as in `divergence`, of the network. probes: how many for each t, 0 for
    the way with the score alone; seed and indices give their signs, see `divergence.rademacher`.
    """

    def __init__(
        self,
        predict: Denoiser,
        method: str,
        dtype: torch.dtype = torch.float32,
        probes: int = 0,
        seed: int = 0,
        indices: Sequence[int] | None = None,
    ):
        self._predict, self._method, self._dtype = predict, method, dtype
        self._probes, self._seed, self._indices = probes, seed, indices
        self._drawn = 0
        self._stretched: deque[torch.Tensor] = deque(maxlen=_STRATA)

    def __call__(
        self, x: torch.Tensor, sigma: float, tangent: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        def predict(x: torch.Tensor) -> torch.Tensor:
            return self._predict(x, sigma)

        if not self._probes:
            step = divergence.difference_step(x, tangent, self._dtype, sigma)
            denoised, derivative = divergence.directional_derivative(predict, x, tangent, self._method, step)
            return denoised, derivative, None
        steps = divergence.trace_steps(x, tangent, self._dtype, self._method, sigma)
        denoised, derivative, t = divergence.trace_derivative(
            predict, x, tangent, lambda derivative: self._draw(x, derivative), self._method, steps
        )
        if self._method != divergence.FORWARD:
            self._stretched.appendleft(derivative)
        return denoised, derivative, t

    def _draw(self, x: torch.Tensor, derivative: torch.Tensor | None) -> list[torch.Tensor]:
        """Probes stratified along what the denoiser's Jacobian stretched at the last nodes, this one (where it is known
        before the probes) among them: it changes most where it is largest."""
        if derivative is not None:
            self._stretched.appendleft(derivative)
        probes = []
        for _ in range(self._probes):
            signs = [
                divergence.random_signs(self._seed, self._drawn, place, self._indices, x)
                for place in range(len(self._stretched))
            ]
            probe = divergence.rademacher(x, self._seed, self._drawn, self._indices)
            probes.append(divergence.stratified(probe, self._stretched, signs))
            self._drawn += 1
        return probes


def trace_alignment(
    differentiate: Differentiate,
    predict: Denoiser,
    x: torch.Tensor,
    tangent: torch.Tensor,
    schedule: Schedule,
    stop: int,
    callback: Callback | None = None,
) -> tuple[torch.Tensor, Profile]:
    """(samples, `Profile`): the flow down a schedule, with its tangent as far as node `stop`.

    differentiate(x, sigma, tangent) -> (denoised, derivative of it along tangent, t or None), see `Differentiate`;
    called once at each of the nodes 0 to stop. predict(x, sigma) -> denoised: for the rest of the schedule, one call
    per step. x, tangent: (B, ...) in the host's units at its first sigma. schedule: strictly descending, only its last
    sigma may be 0; stop: index of a sigma above 0. callback(i, x, denoised): after the calls at node i.
    Raises ValueError where sigmas or stop are not so.
    """
    sigmas, levels = schedule.sigmas, schedule.levels
    if any(b >= a for a, b in zip(sigmas, sigmas[1:])) or not 1 <= stop < len(sigmas) or not sigmas[stop] > 0:
        raise ValueError(
            f"stop is {stop} and sigmas are {brief(sigmas)}; the sigmas must descend strictly, and stop must be "
            "the index of one above 0 that is not the first"
        )
    wide = sum_dtype(x.device)
    batch = len(x)
    alignment: list[torch.Tensor] = []  # of each node, (B,), as those below
    norms: list[torch.Tensor] = []
    curvature: list[torch.Tensor] = []
    evaluated: tuple[torch.Tensor, torch.Tensor | None] = x, None  # eps and t of the last node

    def model(pair: torch.Tensor, sigma: float) -> torch.Tensor:
        nonlocal evaluated
        x, tangent = pair.split(batch)
        if len(alignment) > stop:
            return torch.cat([predict(x, sigma), torch.zeros_like(tangent)])
        denoised, derivative, t = differentiate(x, sigma, tangent)
        evaluated = schedule.path.at(sigma).eps(x, denoised), t
        return torch.cat([denoised, derivative])

    def corrected(i: int, pair: torch.Tensor, denoised: torch.Tensor) -> None:
        """The solver has corrected state and tangent with the call at this node."""
        x, tangent = pair.split(batch)
        if len(alignment) <= stop:
            level, (eps, t) = levels[i], evaluated
            # <-eps / sin(theta), w>, where the radius sqrt(alpha^2 + std^2) of sin and w cancels
            alignment.append(-divergence.probe_trace(eps, tangent) / level.std)
            norms.append(
                torch.linalg.vector_norm(eps.flatten(1), dim=1, dtype=wide)
                * torch.linalg.vector_norm(tangent.flatten(1), dim=1, dtype=wide)
                / level.std
            )
            if t is not None:
                curvature.append(t.to(wide) * (level.alpha**2 + level.std**2) / level.std)
        if callback is not None:
            callback(i, x, denoised[:batch])

    # The last node is reached by a prediction alone; repeating it makes the solver call there and correct.
    if stop == len(sigmas) - 1:
        schedule = Schedule(schedule.path, [*sigmas, sigmas[-1]])
    s = tuple(level.s for level in levels[: stop + 1])
    end = solve(
        model, torch.cat([x, tangent]), schedule, callback=corrected, order=order_of(s), limit_order=False
    )  # an order that falls with the state would not be differentiated
    return end[:batch], Profile(s, _table(alignment), _table(norms), _table(curvature) if curvature else None)


def order_of(s: Sequence[float]) -> int:
    """The solver's order for state and tangent together at the noise levels s, descending: 4 where they end in steps that it is
    stable with, as measured on images, else 3."""
    return 4 if math.log(s[-2] / s[-1]) <= _STABLE_STEP else 3


def _table(rows: list[torch.Tensor]) -> torch.Tensor:
    """(N, B) in float64 on the CPU, of N tensors (B,)."""
    return torch.stack(rows).cpu().double()  # some devices have no float64


def finite_alignment(
    less: torch.Tensor, more: torch.Tensor, score: torch.Tensor, scale_step: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, cosine), (B,) each, from two runs without any derivative.

    less, more: the ends y (B, ...) of runs with the noise times 1 - `scale_step` and 1 + `scale_step`.
    score: grad log p halfway between them. Agrees with A to second order in `scale_step`.
    """
    dtype = sum_dtype(score.device)
    tangent, score = ((less - more).to(dtype) / (2 * scale_step)).flatten(1), score.to(dtype).flatten(1)
    dot = (score * tangent).sum(1)
    return dot, dot / (score.norm(dim=1) * tangent.norm(dim=1))


def percent_response(alignment: torch.Tensor, dim: int) -> torch.Tensor:
    """Predicted change of bits per dimension for 1% more noise: 0.01 A / (D ln 2), any shape."""
    return nats_to_bits_per_dim(-0.01 * alignment, dim)


def scale_for_shift(shift: float, alignment: torch.Tensor, dim: int) -> torch.Tensor:
    """Noise scale that changes the log-density by `shift` bits per dimension (positive: more detail).

    Shape of `alignment`.

    Scaling by r changes the prior's own log-density by -||n||^2 (r^2 - 1) / 2, and to first order the final one by
    A / ||n||^2 times that, hence r = sqrt(1 - 2 shift_nats / A) (derived here; exact for centred Gaussian data).
    Clamped to `SCALE_RANGE`; NaN where A <= 0: not aligned, no scale works.
    """
    square = 1 - 2 * bits_per_dim_to_nats(shift, dim) / alignment
    low, high = SCALE_RANGE
    return torch.where(alignment > 0, square.clamp(low**2, high**2).sqrt(), torch.nan)


def lost_at(cosine: torch.Tensor) -> torch.Tensor:
    """Index of the node from which on the cosine (N, B) stays at or below 0, (B,) ints; -1 where it ends above 0."""
    below = ~(cosine > 0)  # NaN counts as lost
    trailing = below.flip(0).int().cumprod(0).sum(0)
    return torch.where(trailing > 0, len(cosine) - trailing, -1)

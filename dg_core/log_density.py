"""Log-density along any path through noise levels, and the readout of a latent.

State and clock are those of `flow`: u = x / sqrt(alpha^2 + std^2) = y cos(theta), theta = atan(s). Along any curve
u(theta), whatever chose it, the log-density p of u obeys the exact differential

    d log p = -D dln(sin(theta)) + tr Dhat dln(s) - <eps, du - F dtheta> / sin(theta),
    F = cos(theta) eps - sin(theta) denoised,

in which F is the probability-flow ODE, -eps / sin(theta) the score of u, and the identity part of the divergence is
integrated exactly. So errors of a solver do not count: the defect of its states against the flow is corrected with the score.
Source of the rate: arXiv 2502.05807, section 4; the form above and the end: derived here.

symbol     name         unit
Dhat       -            Jacobian of denoised with respect to y, see `divergence`
tr Dhat    trace        1; between 0 (noise rules) and D (the image rules)
log p      log_prob     nats of one image; log p_y = log p_u + D ln cos(theta)
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.interpolate import CubicSpline

from .adams import History, limited_sum
from .divergence import difference_step, directional_derivative, probe_trace, rademacher
from .flow import ORDER, Denoiser
from .levels import clock, clock_rate
from .quadrature import denoised_weights, eps_weights
from .schedule import Level, NoisePath
from .statistics import squared_norm, sum_dtype
from .units import Amount, bits_per_dim_to_nats, error_bits_per_dim, nats_to_bits_per_dim

_DEFECT_NODES = 4
# Richardson: a rule of second order, as that of the defect is, errs by a third of its difference to twice the spacing.
_RICHARDSON = 1 / 3
# Share of the defect in the error of a readout. On exact densities the correction is right, and so small that it adds little;
# on a network, whose eps is no gradient off the flow, readouts at few evaluations erred by up to 4 times the defect.
_DEFECT_SHARE = 2.0
_COMPARABLE = 0.1, 10.0  # ratio of two traces, within which their diagonals are taken to have one shape


# --- weights of the evaluations -----------------------------------------------------------------------------------


def trace_weights(levels: Sequence[float], dim: int) -> np.ndarray:
    """Weights of tr Dhat at noise levels s (monotonic) in its integral over ln s from the first to the last: an array.

    Integrates the cubic spline of tr Dhat dln(s)/dclock on the clock of `levels`. At s = infinity tr Dhat is 0 and so is its
    weight.
    """
    ticks = np.array([clock(s, dim) for s in levels])
    if len(ticks) < 2:
        return np.zeros(len(ticks))
    up = ticks[-1] > ticks[0]
    spline = CubicSpline(*((ticks, np.eye(len(ticks))) if up else (ticks[::-1], np.eye(len(ticks))[::-1])))
    rate = np.array([clock_rate(s, dim) if math.isfinite(s) else math.inf for s in levels])
    return spline.integrate(ticks[0], ticks[-1]) / rate


# --- one evaluation ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the model: denoised (B, ...); tr Dhat and the variance of its estimate, (B,)."""

    denoised: torch.Tensor
    trace: torch.Tensor
    variance: torch.Tensor


class Evaluate(Protocol):
    """x (B, ...) at sigma -> its `Evaluation`; call: number of the evaluation along a path."""

    def __call__(self, x: torch.Tensor, sigma: float, call: int, /) -> Evaluation: ...


class ProbedModel:
    """(x, sigma, call) -> `Evaluation`, with `probes` fresh Rademacher probes for every image and call.

    predict(x, sigma) -> denoised in the host's units. method, and dtype of the network: as in `divergence`. indices: as in
    `divergence.rademacher`.

    The variance of <v, A v> is 2 sum_{i != j} A_ij^2 for symmetric A (more than that for any other). |A v|^2 estimates
    the sum over all i and j; of the diagonal, v_i (A v)_i is an unbiased estimate, and the product of two independent ones
    one of A_ii^2: that of this probe and of the last, scaled to this trace. The very first, and one whose trace is beyond
    `_COMPARABLE` times the last, takes an even diagonal.
    An instance follows one path, from noise level to noise level.
    """

    def __init__(
        self,
        predict: Denoiser,
        path: NoisePath,
        method: str,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        probes: int = 1,
        indices: Sequence[int] | None = None,
    ):
        self._predict, self._path = predict, path
        self._method, self._dtype = method, dtype
        self._seed, self._probes, self._indices = seed, probes, indices
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None  # estimates of diagonal and trace by the last probe

    def __call__(self, x: torch.Tensor, sigma: float, call: int) -> Evaluation:
        level = self._path.at(sigma)
        if level.alpha <= 0:
            zero = torch.zeros(len(x), dtype=sum_dtype(x.device), device=x.device)
            return Evaluation(self._predict(x, sigma), zero, zero)
        traces, variances = [], []
        for probe in range(self._probes):
            v = rademacher(x, self._seed, call * self._probes + probe, self._indices)
            of_x = level.alpha * v.to(x.dtype)  # v is a probe of y = x / alpha
            step = difference_step(x, of_x, self._dtype, level.std)
            denoised, slope = directional_derivative(lambda x: self._predict(x, sigma), x, of_x, self._method, step)
            diagonal, trace = v * slope, probe_trace(v, slope)
            same = trace.square() / x[0].numel()
            if self._last is not None:
                last, last_trace = self._last
                ratio = trace / last_trace  # NaN where both are 0, which is not comparable
                comparable = (ratio >= _COMPARABLE[0]) & (ratio <= _COMPARABLE[1])
                same = torch.where(comparable, probe_trace(diagonal, last) * ratio, same)
            traces.append(trace)
            variances.append(2 * (squared_norm(slope).to(trace.dtype) - same).clamp_min(0))
            self._last = diagonal, trace
        return Evaluation(denoised, torch.stack(traces).mean(0), torch.stack(variances).mean(0) / self._probes)


# --- the integral ------------------------------------------------------------------------------------------------


@dataclass
class _Node:
    theta: float
    u: torch.Tensor
    eps: torch.Tensor
    denoised: torch.Tensor


class LogDensityTrack:
    """The change of log p along the states that a solver visits, upwards or downwards.

    `add` takes them in order, and keeps copies of a few: u, eps and denoised of each. `change` and `error` cover the path so
    far, (B,), in nats of u; `defect` is the part of `change` that comes from states off the flow. `s`, `traces` and
    `eps_energy` (||eps||^2 / D) list what was evaluated.
    """

    def __init__(self, path: NoisePath, dim: int):
        """dim: D, the number of elements of one image."""
        self.path, self.dim = path, dim
        self.sigmas: list[float] = []
        self.s: list[float] = []
        self.traces: list[torch.Tensor] = []
        self.variances: list[torch.Tensor] = []
        self.eps_energy: list[torch.Tensor] = []
        self._nodes: deque[_Node] = deque(maxlen=_DEFECT_NODES)
        self.defect = torch.zeros(())
        # Of every second state, and both defects up to the last of them.
        self._half_nodes: deque[_Node] = deque(maxlen=_DEFECT_NODES)
        self._half_defect = self._defect_at_half = torch.zeros(())

    def add(self, x: torch.Tensor, sigma: float, evaluation: Evaluation) -> None:
        """Add a state x (B, ...) in the host's units, and the model's evaluation there. None of the tensors is kept.

        Raises ValueError for a noise level that is not beyond the last, in the direction of the first two.
        """
        level = self.path.at(sigma)
        thetas = [level.theta, *(n.theta for n in self._nodes)][:3]
        turns = [a - b for a, b in zip(thetas, thetas[1:])]
        if any(turn * turns[-1] <= 0 for turn in turns):
            raise ValueError(
                f"sigma is {sigma:.6g} after noise levels s {[round(s, 6) for s in self.s[-2:]]}; a track of the "
                "log-density takes noise levels that only ascend or only descend"
            )
        eps = level.eps(x, evaluation.denoised)
        self._nodes.appendleft(_Node(level.theta, x / level.scale, eps, evaluation.denoised.clone()))
        self.sigmas.append(sigma)
        self.s.append(level.s)
        self.traces.append(evaluation.trace)
        self.variances.append(evaluation.variance)
        self.eps_energy.append(squared_norm(eps) / self.dim)
        self.defect = self.defect + _last_interval(self._nodes)
        if len(self.s) % 2:
            self._half_nodes.appendleft(self._nodes[0])
            self._half_defect = self._half_defect + _last_interval(self._half_nodes)
            self._defect_at_half = self.defect

    @property
    def denoised(self) -> torch.Tensor:
        """A copy of the model's last prediction."""
        return self._nodes[0].denoised

    @property
    def change(self) -> torch.Tensor:
        """log p_u at the last state minus log p_u at the first, (B,)."""
        return (
            _weighted(trace_weights(self.s, self.dim), self.traces)
            + self.defect
            - self.dim * math.log(sin_theta(self.s[-1]) / sin_theta(self.s[0]))
        )

    @property
    def error(self) -> torch.Tensor:
        """Standard error of `change`, (B,), from the probes and from the spacing of the noise levels.

        The second is `_RICHARDSON` times the change if every other level is left out, less the share of the probes in it. Both
        use the same states: the error of a network whose eps is no gradient off its flow is not included.
        """
        probes = _weighted(trace_weights(self.s, self.dim) ** 2, self.variances)
        count = (len(self.s) - 1) // 2 * 2 + 1
        weights = trace_weights(self.s[:count], self.dim)
        weights[::2] -= trace_weights(self.s[:count:2], self.dim)
        gap = _weighted(weights, self.traces) + self._defect_at_half - self._half_defect
        spacing = (gap.square() - _weighted(weights**2, self.variances)).clamp_min(0)
        return (probes + _RICHARDSON**2 * spacing).sqrt()


def _last_interval(nodes: Sequence[_Node]) -> torch.Tensor:
    """-<eps, du - F dtheta> / sin(theta) over the last interval, (B,): F through the nodes, newest first, the rest linear."""
    if len(nodes) < 2:
        return torch.zeros(())
    new, old = nodes[0], nodes[1]
    thetas = [n.theta for n in nodes]
    defect = new.u - old.u
    for node, w_eps, w_denoised in zip(
        nodes, eps_weights(old.theta, new.theta, thetas), denoised_weights(old.theta, new.theta, thetas)
    ):
        defect.sub_(node.eps, alpha=w_eps).sub_(node.denoised, alpha=w_denoised)
    return -0.5 * (probe_trace(new.eps, defect) / math.sin(new.theta) + probe_trace(old.eps, defect) / math.sin(old.theta))


def _weighted(weights: Iterable[float], values: Iterable[torch.Tensor]) -> torch.Tensor:
    return sum((float(w) * v for w, v in zip(weights, values)), start=torch.zeros(()))


def sin_theta(s: float) -> float:
    """sin(atan(s)) at the noise level s, which may be infinite."""
    return s / math.hypot(1, s) if math.isfinite(s) else 1.0


def cos_log(s: float) -> float:
    """ln cos(theta) at the finite noise level s."""
    return -0.5 * math.log1p(s * s)


def bits_of_state(log_p_u: Amount, s: float, dim: int) -> Amount:
    """Bits per dimension of y, any shape, from the log-density of u in nats, at the finite noise level s."""
    return nats_to_bits_per_dim(log_p_u + dim * cos_log(s), dim)


def state_of_bits(bits: Amount, s: float, dim: int) -> Amount:
    """Inverse of `bits_of_state`."""
    return bits_per_dim_to_nats(bits, dim) - dim * cos_log(s)


# --- the end -----------------------------------------------------------------------------------------------------


def log_start(predict: Denoiser, x: torch.Tensor, level: Level, evaluation: Evaluation) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_prior` with the call that it takes where alpha is above 0. predict(x, sigma) -> denoised."""
    return log_prior(x, level, evaluation, predict(-x, level.sigma) if level.alpha > 0 else evaluation.denoised)


def log_prior(
    x: torch.Tensor, level: Level, evaluation: Evaluation, opposite: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p_u of a state x at the highest noise level of a model, and a scale of its error: two (B,), in nats.

    Where alpha is 0 it is that of unit noise, without error. Else the data still shows: above s, denoised is taken to go as
    m + k s / s', so that eps tends to n = (y - m - k / 2) / s and tr Dhat falls as 1 / s'^2, which gives
    log p_y = -|n|^2 / 2 - D/2 ln(2 pi s^2) - tr Dhat / 2. opposite: the model's denoised at -x, as typical a state as x,
    so that m and k are the even and the odd part; unused where alpha is 0. The error is of the next order in k / s.
    """
    dim = x[0].numel()
    wide = sum_dtype(x.device)
    if level.alpha <= 0:
        log_p_u = -0.5 * squared_norm(x / level.std).to(wide) - dim / 2 * math.log(2 * math.pi)
        return log_p_u, torch.zeros_like(log_p_u)
    s = level.s
    m, k = (evaluation.denoised + opposite) / 2, (evaluation.denoised - opposite) / 2
    n = (x / level.alpha - m - k / 2) / s
    log_p_y = -0.5 * squared_norm(n).to(wide) - dim / 2 * math.log(2 * math.pi * s * s) - evaluation.trace / 2
    return log_p_y - dim * cos_log(s), squared_norm(k / s).to(wide) / 2


# --- the readout -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readout:
    """log_prob and standard_error of log p_s(y), (B,), in nats; and the path: noise levels s, and lists of (B,) per level."""

    log_prob: torch.Tensor
    standard_error: torch.Tensor
    dim: int
    s: list[float]
    traces: list[torch.Tensor]
    eps_energy: list[torch.Tensor]  # ||eps||^2 / D

    @property
    def bits_per_dim(self) -> torch.Tensor:
        """-log2 p / D, (B,)."""
        return nats_to_bits_per_dim(self.log_prob, self.dim)

    @property
    def error_bits_per_dim(self) -> torch.Tensor:
        """Standard error of it, (B,)."""
        return error_bits_per_dim(self.standard_error, self.dim)

    def rates(self) -> torch.Tensor:
        """d log p_y / d(log-SNR) / D at every level, (levels, B): (1 - tr Dhat / D) / 2, with lambda = -2 ln s."""
        return (1 - torch.stack(self.traces) / self.dim) / 2


class _Ascent:
    """The flow up through ascending noise levels: third order, one evaluation a level, corrected with it; see `adams`."""

    def __init__(self) -> None:
        self._eps, self._denoised = History(eps_weights, ORDER), History(denoised_weights, ORDER)
        self._theta, self._u = 0.0, torch.zeros(())  # where it is, corrected

    def state(self, level: Level) -> torch.Tensor:
        """The predicted state x (B, ...) at the next noise level."""
        return self._flow(level.theta, correct=False) * level.scale

    def add(self, x: torch.Tensor, level: Level, denoised: torch.Tensor) -> None:
        """The model's prediction (B, ...) at x, the first state or a predicted one."""
        self._eps.add(level.theta, level.eps(x, denoised), level.theta)
        self._denoised.add(level.theta, denoised.clone(), level.theta)
        self._u = self._flow(level.theta, correct=True) if self._eps.nodes > 1 else x / level.scale
        self._theta = level.theta

    def _flow(self, theta: float, correct: bool) -> torch.Tensor:
        terms = (history.terms(self._theta, theta, correct) for history in (self._eps, self._denoised))
        return self._u + limited_sum(zip(*terms))


def read_log_density(
    evaluate: Evaluate, predict: Denoiser, y: torch.Tensor, levels: Sequence[float], path: NoisePath
) -> Readout:
    """The log-density of y (B, ...) at the first of the noise levels s, `levels`, ascending floats: a `Readout`.

    evaluate: called once at every level, for instance a `ProbedModel`; predict: called once more where the last level is
    finite. An `_Ascent` carries the latent up, one evaluation per level; the defect of its states against the flow is corrected
    with the score. Where a network's eps is no gradient that correction is partly wrong, so the defect counts as an error too.
    """
    track, ascent = LogDensityTrack(path, y[0].numel()), _Ascent()
    for call, s in enumerate(levels):
        level = path.at(path.sigma(s))
        x = ascent.state(level) if call else y * level.alpha
        evaluation = evaluate(x, level.sigma, call)
        track.add(x, level.sigma, evaluation)
        ascent.add(x, level, evaluation.denoised)
    end, end_error = log_start(predict, x, level, evaluation)
    log_prob = end - track.change + track.dim * cos_log(levels[0])
    error = (track.error**2 + end_error**2 + (_DEFECT_SHARE * track.defect) ** 2).sqrt()
    return Readout(log_prob, error, track.dim, track.s, track.traces, track.eps_energy)


def rounding_cost(one: torch.Tensor, other: torch.Tensor, levels: Sequence[float], dim: int) -> float:
    """Least error of a readout, bits per dimension, that rounding in a network causes; a float.

    one, other: traces (B,) with the same probe, at states that differ by less than the rounding unit. How far they are apart
    is the error of one level, and levels err independently. What is rounded alike every time, as in the embedding of the
    noise level, is not seen.
    """
    per_level = float((one - other).square().mean().sqrt()) / 2**0.5
    return error_bits_per_dim(per_level * float((trace_weights(levels, dim) ** 2).sum()) ** 0.5, dim)

"""Multistep integration of a sum of smooth functions, known at the last evaluations, with an order limiter.

An exponential Adams method: each function is interpolated through its last values and integrated against its own weights (see
`quadrature`). The step is a sum of terms, what one node gives and what each further node adds. Few steps at a high CFG are
stiff, and there high orders are unstable: where the terms don't fall off, image by image, the limiter leaves them out, down
to the step of one node, which is stable.

Adams methods in predict-evaluate-correct mode: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section
III.1. The limiter: derived here.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from .quadrature import Weights, lagrange
from .statistics import per_image, squared_norm

# A term counts in full up to the first share of the term before, and not at all from the second; see `limited_sum`.
SHARES = 0.3, 1.0  # 20 steps of a smooth flow stay below 0.3
SHARES_AFTER_EXTRAPOLATION = 0.15, 0.5  # with `SHARES` few steps at a high CFG leave the range
_LEAST_TERM = 0.05  # of the first term of a series, see `limited_sum`
_MIN_SPACING = 0.02  # of the coming step; no scheduler of the host comes near it

Terms = Iterator[tuple[torch.Tensor, torch.Tensor]]


class History:
    """The latest values of one smooth function, newest first, with the theta where each was taken."""

    def __init__(self, weights: Weights, predictor_nodes: int):
        """weights: of the function's integral, see `quadrature`. predictor_nodes: how many values a prediction interpolates."""
        self._weights = weights
        self._predictor_nodes = predictor_nodes
        self._theta: list[float] = []
        self._values: list[torch.Tensor] = []
        self._extrapolated = 0  # how many of them, the oldest, the next value replaces

    @property
    def nodes(self) -> int:
        """How many values it has."""
        return len(self._theta)

    def add(self, theta: float, value: torch.Tensor, next_theta: float) -> None:
        """Add the value (B, ...) at theta, from where the next step leads to next_theta."""
        self._forget_extrapolated()
        # Extrapolating far through two nodes that almost coincide amplifies their difference.
        kept = [j for j, t in enumerate(self._theta) if abs(t - theta) > _MIN_SPACING * (theta - next_theta)]
        kept = kept[: self._predictor_nodes]
        self._theta = [theta, *(self._theta[j] for j in kept)]
        self._values = [value, *(self._values[j] for j in kept)]

    def replace(self, theta: float, value: torch.Tensor, next_theta: float) -> None:
        """The value (B, ...) in place of the newest one, with the same theta."""
        self._values[0] = value

    def add_after_jump(self, theta: float, value: torch.Tensor, next_theta: float, once: bool) -> None:
        """Add a value of another path, to which the state has jumped at theta.

        The past of that path is unknown. It is taken to be the past of the old one, moved by the jump; once: until the next
        value only. Where the value before the jump was extrapolated over a whole step, its error is taken for part of the jump,
        and grows if the moved past is kept.
        """
        self._forget_extrapolated()
        if self._theta:
            change = value - self.at(theta)
            kept = [j for j, t in enumerate(self._theta) if t > theta]  # `add` drops what is too near
            self._theta = [self._theta[j] for j in kept]
            self._values = [self._values[j] + change for j in kept]
        self.add(theta, value, next_theta)
        self._extrapolated = len(self._theta) - 1 if once else 0

    def at(self, theta: float) -> torch.Tensor:
        """The value (B, ...) that the nodes of a prediction lead to at theta."""
        nodes = self._theta[: self._predictor_nodes]
        weights = [float(p[0]) for p in lagrange(nodes, np.array([theta]))]
        return sum((w * value for w, value in zip(weights, self._values)), start=torch.zeros(()))

    def terms(self, theta_from: float, theta_to: float, correct: bool) -> Iterator[torch.Tensor]:
        """What each node adds to the integral from theta_from to theta_to; the first term is that of one node, near theta_from.

        `correct` uses one more node than a prediction. No terms before the first value.
        """
        if not self._theta:
            return
        nodes = list(zip(self._theta, self._values))[: self._predictor_nodes + correct]
        if correct:
            nodes[:2] = nodes[1::-1]  # the newest node is theta_to
        theta, values = zip(*nodes)
        used = [0.0] * len(nodes)
        for n in range(1, len(nodes) + 1):
            weights = self._weights(theta_from, theta_to, theta[:n])
            yield sum(((w - u) * value for w, u, value in zip(weights, used, values)), start=torch.zeros(()))
            used[:n] = weights

    def _forget_extrapolated(self) -> None:
        if self._extrapolated:
            del self._theta[-self._extrapolated :], self._values[-self._extrapolated :]
            self._extrapolated = 0


def limited_sum(terms: Terms, region: torch.Tensor | None = None, shares: tuple[float, float] = SHARES) -> torch.Tensor:
    """The sum of the terms of a series, without those that don't fall off; each is a pair of tensors (B, ...) to be added.

    A term counts in full where its norm is up to shares[0] of that of the term before, and is left out from shares[1] on;
    with a term, those after it are left out as much. The parts of the first term may cancel, as they do where the data has
    the variance of the noise, and are measured one by one. region: None, or weights of the elements in the norms.
    """
    parts = next(terms)
    total = parts[0] + parts[1]
    first = before = (squared_norm(parts[0], region) + squared_norm(parts[1], region)).sqrt()
    full, none = shares
    kept = torch.ones_like(first)
    for one, other in terms:
        term = one + other
        norm = squared_norm(term, region).sqrt()
        # A term that happens to be near zero says nothing of the next one.
        ratio = norm / torch.maximum(before, _LEAST_TERM * first).clamp_min(1e-30)
        kept = kept * ((none - ratio) / (none - full)).clamp(0, 1)
        total, before = torch.addcmul(total, term, per_image(kept, term.ndim)), norm
    return total


def whole_sum(terms: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The sum of all terms of a series, (B, ...)."""
    return sum((one + other for one, other in terms), start=torch.zeros(()))

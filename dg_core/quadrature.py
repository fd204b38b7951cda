"""Quadrature weights of the probability-flow ODE on the clock theta = atan(s).

In the variance-preserving state u = x / sqrt(alpha^2 + std^2) the flow is

    du/dtheta = cos(theta) eps - sin(theta) denoised,

and guidance adds sin(theta) (eta - 1) eps per unit of ln s. Each part is interpolated by Lagrange polynomials in theta
through some nodes and integrated against its own measure, by Gauss-Legendre quadrature; with one node the plain flow is the
DDIM step. Derived here.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# (theta_from, theta_to, nodes) -> one weight for each node
Weights = Callable[[float, float, Sequence[float]], list[float]]

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def eps_weights(theta_from: float, theta_to: float, nodes: Sequence[float]) -> list[float]:
    """Weights of eps at theta = `nodes` in the integral of cos(theta) eps over theta."""
    theta, measure = _points(theta_from, theta_to)
    return [float((measure * np.cos(theta)) @ p) for p in lagrange(nodes, theta)]


def denoised_weights(theta_from: float, theta_to: float, nodes: Sequence[float]) -> list[float]:
    """Weights of denoised at theta = `nodes` in the integral of -sin(theta) denoised over theta."""
    theta, measure = _points(theta_from, theta_to)
    return [float((measure * -np.sin(theta)) @ p) for p in lagrange(nodes, theta)]


def guidance_weights(theta_from: float, theta_to: float, nodes: Sequence[float]) -> list[float]:
    """Weights of a function of theta at `nodes` in its integral over ln s = ln tan(theta)."""
    log_s, measure = _points(math.log(math.tan(theta_from)), math.log(math.tan(theta_to)))
    return [float(measure @ p) for p in lagrange(nodes, np.arctan(np.exp(log_s)))]


def lagrange(nodes: Sequence[float], t: np.ndarray) -> Iterator[np.ndarray]:
    """Values at t (n,) of the Lagrange polynomials through `nodes`, one (n,) array each."""
    for j, node in enumerate(nodes):
        rest = [m for i, m in enumerate(nodes) if i != j]
        yield math.prod(((t - m) / (node - m) for m in rest), start=np.ones_like(t))


def _points(start: float, stop: float) -> tuple[np.ndarray, np.ndarray]:
    return start + (stop - start) * (_POINTS + 1) / 2, (stop - start) / 2 * _WEIGHTS

"""The pack's own solver of the guided flow: third order, one model call per step.

The state is the variance-preserving one, u = x / sqrt(alpha^2 + sigma^2), and the clock theta = atan(s) = atan2(sigma,
alpha), which is regular at both ends of a schedule (s = 0, and s = infinity where a flow model has sigma = 1):

    du = (cos(theta) eps - sin(theta) denoised) dtheta + g dln(s),      g = sin(theta) (eta - 1) eps

eps and denoised are smooth in theta, and constant wherever the noise or the picture rules; the guidance g is singular in
theta, but smooth against ln(s). Each is interpolated by Lagrange polynomials in theta through the last model calls and
integrated against its own measure (an exponential Adams method; with one node it is the DDIM step). A step predicts,
calls the model once, and corrects with that call (predict-evaluate-correct).

Source of the flow: arXiv 2502.05807, section 5. State, clock and the split of the measures: derived here. Adams methods
in this mode: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section III.1.
"""

import math

import numpy as np
import torch

from .coordinates import eps_from_denoised, per_image
from .guidance import curve_at, eta_minus_one, gain
from .statistics import region_of, squared_norm

ORDER = 3
_GUIDANCE_NODES = 2
_MIN_SPACING = 0.02  # of the coming step; no scheduler of the host comes near it
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def eps_weights(theta_from, theta_to, nodes):
    """Weights of eps at theta = `nodes` in the integral of cos(theta) eps over theta."""
    theta, measure = _quadrature(theta_from, theta_to)
    return [float((measure * np.cos(theta)) @ p) for p in _lagrange(nodes, theta)]


def denoised_weights(theta_from, theta_to, nodes):
    """Weights of denoised at theta = `nodes` in the integral of -sin(theta) denoised over theta."""
    theta, measure = _quadrature(theta_from, theta_to)
    return [float((measure * -np.sin(theta)) @ p) for p in _lagrange(nodes, theta)]


def guidance_weights(theta_from, theta_to, nodes):
    """Weights of g at theta = `nodes` in its integral over ln s = ln tan(theta)."""
    log_s, measure = _quadrature(math.log(math.tan(theta_from)), math.log(math.tan(theta_to)))
    return [float(measure @ p) for p in _lagrange(nodes, np.arctan(np.exp(log_s)))]


def _quadrature(start, stop):
    return start + (stop - start) * (_POINTS + 1) / 2, (stop - start) / 2 * _WEIGHTS


def _lagrange(nodes, t):
    """Values at t (n,) of the Lagrange polynomials through `nodes`, one (n,) array each."""
    for j, node in enumerate(nodes):
        rest = [m for i, m in enumerate(nodes) if i != j]
        yield math.prod(((t - m) / (node - m) for m in rest), start=np.ones_like(t))


class _History:
    """The latest values of one smooth part of the flow, newest first, with the theta where each was taken."""

    def __init__(self, weights, predictor_nodes):
        self._weights = weights
        self._predictor_nodes = predictor_nodes
        self._theta, self._values = [], []

    def add(self, theta, value, next_theta):
        # Extrapolating far through two nodes that almost coincide amplifies their difference.
        if self._theta and self._theta[0] - theta <= _MIN_SPACING * (theta - next_theta):
            del self._theta[0], self._values[0]
        self._theta = [theta, *self._theta[:self._predictor_nodes]]
        self._values = [value, *self._values[:self._predictor_nodes]]

    def integrate(self, u, theta_from, theta_to, correct):
        """u plus the integral from theta_from to theta_to; `correct` uses one more node than a prediction."""
        n = self._predictor_nodes + correct
        weights = self._weights(theta_from, theta_to, self._theta[:n])
        for w, value in zip(weights, self._values[:n]):
            u = torch.add(u, value, alpha=w)
        return u


def solve(model, x, sigmas, coordinates, guided, z=0.0, dim=1, mask=None, callback=None, weights=None,
          curve=None, order=ORDER):
    """Integrate the guided flow down `sigmas`.

    model(x, sigma) -> denoised, for x (B, ...) in the host's units and sigma a float of the schedule; one call per step,
    none where a sigma repeats the one before.
    sigmas: descending floats. z, dim: float or (B,), see `guidance`; z = 0.0 is the plain flow, and z may be a function of
    the step, asked after the model's call at its sigma. guided: the `GuidedRange` of these sigmas. mask: None, or in [0, 1]
    the share of each element that the model replaces, the rest being given (inpainting). weights, curve: see
    `guidance.PredictionGuide`. mask and weights are broadcastable to x.
    callback(i, x, denoised): after each model call; x is the corrected state, denoised the unguided prediction.
    order: how many model calls a prediction of the plain flow interpolates.

    Returns x at the last sigma. A last step to sigma = 0 returns the denoised prediction, unguided.
    """
    steering = callable(z) or torch.is_tensor(z) or z != 0
    guidance_gain = None if callable(z) else gain(z, dim, x)
    region = None if mask is None else region_of(mask)
    amount = mask if weights is None else weights if mask is None else weights * mask
    weights = region if weights is None else weights
    curve = None if curve is None else torch.tensor(curve, dtype=torch.float64)
    alphas = [coordinates.alpha(v) for v in sigmas]
    scales = [math.hypot(a, v) for a, v in zip(alphas, sigmas)]
    thetas = [math.atan2(v, a) for a, v in zip(alphas, sigmas)]
    ahead = [next((t for t in thetas[i + 1:] if t < thetas[i]), thetas[i]) for i in range(len(thetas))]
    noise = _History(eps_weights, order)
    picture = _History(denoised_weights, order)
    guidance = _History(guidance_weights, _GUIDANCE_NODES)

    def advance(u, step, correct):
        """From node `step` to the next one."""
        u = noise.integrate(u, thetas[step], thetas[step + 1], correct)
        u = picture.integrate(u, thetas[step], thetas[step + 1], correct)
        if steering and guided.first <= step < guided.last:
            u = guidance.integrate(u, thetas[step], thetas[step + 1], correct)
        return u

    start = None  # the corrected state at the previous node
    for i in range(len(sigmas) - 1):
        if i and sigmas[i] == sigmas[i - 1]:  # the state is still the same, and so is what the model says of it
            if callback is not None:
                callback(i, x, denoised)
        else:
            denoised = model(x, sigmas[i])
            eps = eps_from_denoised(x, denoised, sigmas[i], alphas[i])
            noise.add(thetas[i], eps, ahead[i])
            picture.add(thetas[i], denoised, ahead[i])
            if steering and guided.first <= i <= guided.last and alphas[i] > 0:
                k = (2 * dim) ** 0.5 * z(i).to(x) if callable(z) else guidance_gain
                strength = per_image(math.sin(thetas[i]) * eta_minus_one(squared_norm(eps, weights), k), x.ndim)
                if curve is not None:
                    strength = strength * curve_at(curve, guided, torch.tensor(coordinates.s(sigmas[i]), dtype=torch.float64))
                guidance.add(thetas[i], eps * (strength if amount is None else strength * amount), ahead[i])
            drift = 0.0
            if start is None:
                u = x / scales[i]
            else:
                u = advance(start, i - 1, correct=True)
                drift = u * scales[i] - x
                x = x + drift
            if callback is not None:
                callback(i, x, denoised)
            start = u
        if sigmas[i + 1] == 0:
            # The prediction was made before the correction: keep its eps and move with the state.
            return denoised + (drift if mask is None else drift * region) / alphas[i] if alphas[i] > 0 else denoised
        if sigmas[i + 1] < sigmas[i]:
            x = advance(start, i, correct=False) * scales[i + 1]
    return x

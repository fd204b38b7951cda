"""The pack's own solver of the guided flow: third order, one model call per step.

The state is the variance-preserving one, u = x / sqrt(alpha^2 + sigma^2), and the clock theta = atan(s) = atan2(sigma,
alpha), which is regular at both ends of a schedule (s = 0, and s = infinity where a flow model has sigma = 1):

    du = (cos(theta) eps - sin(theta) denoised) dtheta + g dln(s),      g = sin(theta) (eta - 1) eps

eps and denoised are smooth in theta, and constant wherever the noise or the picture rules; the guidance g is singular in
theta, but smooth against ln(s). Each is interpolated by Lagrange polynomials in theta through the last model calls and
integrated against its own measure (an exponential Adams method; with one node it is the DDIM step). A step predicts,
calls the model once, and corrects with that call (predict-evaluate-correct).

Few steps at a high CFG are stiff, and there high orders are unstable. The step is a sum of terms, the DDIM step and what
each further node adds; where they don't fall off, image by image, they are left out, down to the DDIM step, which is stable.

Source of the flow: arXiv 2502.05807, section 5. State, clock, the split of the measures and the choice of the order: derived
here. Adams methods in this mode: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section III.1.
"""

import math
from functools import partial

import numpy as np
import torch

from .schedule import eps_from_denoised, per_image
from .control import curve_at, eta_minus_one, gain
from .statistics import region_of, squared_norm
from .variation import displacement, level_set_step

ORDER = 3
_GUIDANCE_NODES = 2
# A term counts in full up to the first share of the term before, and not at all from the second; see `trusted`.
_TRUST = 0.3, 1.0  # 20 steps of a smooth flow stay below 0.3
_TRUST_OF_GUESSES = 0.15, 0.5  # after a jump whose foot was guessed; with `_TRUST` few steps at a high CFG leave the range
_LEAST_TERM = 0.05  # of the first term of a series, see `trusted`
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
        self._guessed = 0  # how many of them, the oldest, are to be left again

    @property
    def empty(self):
        return not self._theta

    def _forget_guesses(self):
        if self._guessed:
            del self._theta[-self._guessed:], self._values[-self._guessed:]
            self._guessed = 0

    def add(self, theta, value, next_theta):
        self._forget_guesses()
        # Extrapolating far through two nodes that almost coincide amplifies their difference.
        kept = [j for j, t in enumerate(self._theta) if abs(t - theta) > _MIN_SPACING * (theta - next_theta)]
        kept = kept[:self._predictor_nodes]
        self._theta = [theta, *(self._theta[j] for j in kept)]
        self._values = [value, *(self._values[j] for j in kept)]

    def jump(self, theta, value, next_theta, once):
        """Add a value of another path, to which the state has jumped at theta.

        The past of that path was never seen. It is taken to be the past of the old one, moved by the jump; once: until the
        next value only. Where the value at the foot of the jump is extrapolated over a whole step, the error of that is taken
        for part of the jump, and grows if the moved past is kept.
        """
        self._forget_guesses()
        if self._theta:
            change = value - self.at(theta)
            kept = [j for j, t in enumerate(self._theta) if t > theta]  # `add` drops what is too near
            self._theta = [self._theta[j] for j in kept]
            self._values = [self._values[j] + change for j in kept]
        self.add(theta, value, next_theta)
        self._guessed = len(self._theta) - 1 if once else 0

    def at(self, theta):
        """The value at theta that the nodes of a prediction lead to."""
        nodes = self._theta[:self._predictor_nodes]
        weights = [float(p[0]) for p in _lagrange(nodes, np.array([theta]))]
        return sum(w * value for w, value in zip(weights, self._values))

    def terms(self, theta_from, theta_to, correct):
        """What each node adds to the integral from theta_from to theta_to; the first term is that of one node, near theta_from.

        `correct` uses one more node than a prediction. No terms before the first value.
        """
        if self.empty:
            return
        nodes = list(zip(self._theta, self._values))[:self._predictor_nodes + correct]
        if correct:
            nodes[:2] = nodes[1::-1]  # the newest node is theta_to
        theta, values = zip(*nodes)
        used = [0.0] * len(nodes)
        for n in range(1, len(nodes) + 1):
            weights = self._weights(theta_from, theta_to, theta[:n])
            yield sum((w - u) * value for w, u, value in zip(weights, used, values))
            used[:n] = weights


def trusted(terms, region=None, trust=_TRUST):
    """The sum of the terms of a series, without those that don't fall off; each is a pair of tensors (B, ...) to be added.

    A term counts in full where its norm is up to the share trust[0] of that of the term before, and is left out from trust[1]
    on; with a term, those after it are left out as much. The parts of the first term may cancel, as they do where the data has
    the variance of the noise, and are measured one by one. region: None, or weights of the elements in the norms.
    """
    parts = next(terms)
    total = parts[0] + parts[1]
    first = before = sum(squared_norm(part, region) for part in parts).sqrt()
    full, none = trust
    kept = 1.0
    for one, other in terms:
        term = one + other
        norm = squared_norm(term, region).sqrt()
        # A term that happens to be near zero says nothing of the next one.
        ratio = norm / torch.maximum(before, _LEAST_TERM * first).clamp_min(1e-30)
        kept = kept * ((none - ratio) / (none - full)).clamp(0, 1)
        total, before = torch.addcmul(total, term, per_image(kept, term.ndim)), norm
    return total


def _sum(terms):
    return sum(one + other for one, other in terms)


class _Flow:
    """The guided flow as the model calls so far describe it."""

    def __init__(self, coordinates, guided, z, dim, mask, weights, curve, order, cautious, like):
        """like: a tensor of the dtype and device to work in; the rest as in `solve`."""
        self._coordinates = coordinates
        self._guided = guided
        self._region = None if mask is None else region_of(mask)
        self._cautious = cautious
        self._trust = _TRUST
        self._steering = callable(z) or torch.is_tensor(z) or z != 0
        if callable(z):
            self._gain = lambda step: (2 * dim) ** 0.5 * z(step).to(like)
        else:
            constant = gain(z, dim, like)
            self._gain = lambda step: constant
        self.amount = mask if weights is None else weights if mask is None else weights * mask
        self._weights = (None if mask is None else region_of(mask)) if weights is None else weights
        self._curve = None if curve is None else torch.tensor(curve, dtype=torch.float64)
        self._noise = _History(eps_weights, order)
        self._picture = _History(denoised_weights, order)
        self._guidance = _History(guidance_weights, _GUIDANCE_NODES)

    def see_jump(self, x, denoised, sigma, step, next_theta, guessed):
        """`see`, of a state that has jumped; guessed: from a foot that no call has seen."""
        if guessed:
            self._trust = _TRUST_OF_GUESSES
        self.see(x, denoised, sigma, step, next_theta, partial(_History.jump, once=guessed))

    def see(self, x, denoised, sigma, step, next_theta, put=_History.add):
        """Take a prediction at (x, sigma) into account.

        step: the step that starts there. put: how the histories take it.
        """
        alpha = self._coordinates.alpha(sigma)
        theta = math.atan2(sigma, alpha)
        eps = eps_from_denoised(x, denoised, sigma, alpha)
        put(self._noise, theta, eps, next_theta)
        put(self._picture, theta, denoised, next_theta)
        if self._steering and self._guided.first <= step <= self._guided.last and alpha > 0:
            eta = eta_minus_one(squared_norm(eps, self._weights), self._gain(step))
            strength = per_image(math.sin(theta) * eta, x.ndim)
            if self._curve is not None:
                s = torch.tensor(self._coordinates.s(sigma), dtype=torch.float64)
                strength = strength * curve_at(self._curve, self._guided, s)
            put(self._guidance, theta, eps * (strength if self.amount is None else strength * self.amount), next_theta)

    def follow(self, u, theta_from, theta_to, step, correct=False):
        """The state u at theta_from, followed to theta_to during `step`."""
        noise, picture = (part.terms(theta_from, theta_to, correct) for part in (self._noise, self._picture))
        terms = zip(noise, picture, strict=True)
        u = u + (trusted(terms, self._region, self._trust) if self._cautious else _sum(terms))
        return self.guide(u, theta_from, theta_to, step, correct)

    def guide(self, u, theta_from, theta_to, step, correct=False):
        """u and what guidance adds to it from theta_from to theta_to, as far as it is known."""
        if self._steering and self._guided.first <= step < self._guided.last:
            u = u + sum(self._guidance.terms(theta_from, theta_to, correct))
        return u

    @property
    def met_guidance(self):
        """Whether a prediction in the guided range has been seen."""
        return not self._guidance.empty

    def eps_at(self, theta):
        """The eps that the path leads to at theta."""
        return self._noise.at(theta)

    def denoised_at(self, theta):
        """The denoised prediction that the path leads to at theta."""
        return self._picture.at(theta)


def solve(model, x, sigmas, coordinates, guided, z=0.0, dim=1, mask=None, callback=None, weights=None,
          curve=None, order=ORDER, variation=None, cautious=True):
    """Integrate the guided flow down `sigmas`.

    model(x, sigma) -> denoised, for x (B, ...) in the host's units and sigma a float of the schedule; one call per step,
    none where a sigma repeats the one before.
    sigmas: descending floats. z, dim: float or (B,), see `control`; z = 0.0 is the plain flow, and z may be a function of
    the step, asked after the model's call at its sigma. guided: the `GuidedRange` of these sigmas. mask: None, or in [0, 1]
    the share of each element that the model replaces, the rest being given (inpainting). weights, curve: see
    `control.PredictionGuide`. mask and weights are broadcastable to x.
    callback(i, x, denoised): once for each step, after the model's call at its sigma; x is the corrected state, denoised the
    unguided prediction. A step whose only call lies at a raised noise level reports before it, with what the calls so far
    lead to.
    order: how many model calls a prediction of the plain flow interpolates. cautious: whether the order falls where the
    terms of a step don't, see `trusted`.
    variation: None, or a `variation.Variation`: noise at an unchanged log-density in some steps, of the strength that mask
    and weights leave to each element. Its model calls may lie at noise levels between those of the schedule.

    Returns x at the last sigma. A last step to sigma = 0 returns the denoised prediction, unguided.
    """
    region = None if mask is None else region_of(mask)
    alphas = [coordinates.alpha(v) for v in sigmas]
    scales = [math.hypot(a, v) for a, v in zip(alphas, sigmas)]
    thetas = [math.atan2(v, a) for a, v in zip(alphas, sigmas)]
    ahead = [next((t for t in thetas[i + 1:] if t < thetas[i]), thetas[i]) for i in range(len(thetas))]
    flow = _Flow(coordinates, guided, z, dim, mask, weights, curve, order, cautious, x)

    def jump(u, theta, step, s):
        """From the state u at theta to the noise level s above it, by noise: (u, theta, denoised) there."""
        sigma, raised = coordinates.sigma(s), math.atan(s)
        scale = math.hypot(coordinates.alpha(sigma), sigma)
        met_guidance = flow.met_guidance
        foot = flow.follow(u, theta, raised, step)
        if variation.calls_foot:
            flow.see(foot * scale, model(foot * scale, sigma), sigma, step, ahead[step])
        eps = flow.eps_at(raised)
        change = displacement(u, foot, eps, theta, raised, variation.noise(u), flow.amount)
        x = (foot + change) * scale
        denoised = model(x, sigma)
        alpha = coordinates.alpha(sigma)
        u, eps = level_set_step(foot, change, eps, eps_from_denoised(x, denoised, sigma, alpha), flow.amount)
        flow.see_jump(u * scale, (u * scale - sigma * eps) / alpha, sigma, step, ahead[step], not variation.calls_before)
        if not met_guidance:  # after pure noise, which is not guided, the way up could not be, and the way down will be
            u = flow.guide(u, theta, raised, step)
        return u, raised, denoised

    start = None  # the corrected state at the previous node, and its theta
    for i in range(len(sigmas) - 1):
        levels = [] if variation is None else variation.levels(sigmas, i, coordinates)
        if i and sigmas[i] == sigmas[i - 1]:  # the state is still the same, and so is what the model says of it
            if callback is not None:
                callback(i, x, denoised)
        elif not levels or variation.calls_before:
            denoised = model(x, sigmas[i])
            flow.see(x, denoised, sigmas[i], i, ahead[i])
            drift = 0.0
            if start is None:
                u = x / scales[i]
            else:
                u = flow.follow(*start, thetas[i], i - 1, correct=True)
                drift = u * scales[i] - x
                x = x + drift
            if callback is not None:
                callback(i, x, denoised)
            start = u, thetas[i]
        else:
            start, drift = (x / scales[i], thetas[i]), 0.0
            if callback is not None:
                callback(i, x, flow.denoised_at(thetas[i]))
        for s in levels:
            *start, denoised = jump(*start, i, s)
        if sigmas[i + 1] == 0:
            # The prediction was made before the correction: keep its eps and move with the state.
            return denoised + (drift if mask is None else drift * region) / alphas[i] if alphas[i] > 0 else denoised
        if sigmas[i + 1] < sigmas[i]:
            x = flow.follow(*start, thetas[i + 1], i) * scales[i + 1]
    return x

"""Coordinates: one adapter from any Gaussian noise schedule to eps, score and log-SNR.

Forward process x = alpha * x0 + sigma * n with n ~ N(0, I). Dividing by alpha gives "variance-exploding" (VE)
coordinates, in which every model is the same:

symbol      name          definition
sigma       sigma         the noise level that the host passes to a model
alpha       alpha         weight of the picture: 1 (VE) or 1 - sigma (flow matching)
y           y             x / alpha
s           s             sigma / alpha, the noise level in VE coordinates
x0_hat      denoised      E[x0 | x], what the host's model(x, sigma) returns
eps         eps           (x - alpha * denoised) / sigma = (y - denoised) / s
lambda      log_snr       -2 ln s
D           dim           number of elements of one image

The score of y is -eps / s and the probability-flow ODE is dy/ds = eps.
Source: Karczewski, Heinonen, Garg, "Devil is in the Details: Density Guidance" (ICML 2025, arXiv 2502.05807).
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Coordinates:
    """A noise schedule as data: alpha = 1 - `slope` * sigma."""

    name: str
    slope: float

    def alpha(self, sigma):
        """alpha at sigma; float or tensor, same kind as `sigma`."""
        return 1 - self.slope * sigma

    def s(self, sigma):
        """VE noise level s = sigma / alpha of a float; infinite where alpha is 0."""
        alpha = self.alpha(sigma)
        return sigma / alpha if alpha > 0 else math.inf

    def sigma(self, s):
        """sigma at the VE noise level s, a float; s may be infinite where sigma stays finite."""
        return s / (1 + self.slope * s) if math.isfinite(s) else 1 / self.slope


VE = Coordinates("VE", 0.0)
FLOW = Coordinates("flow", 1.0)

# Class names of the host's model samplings. The first one in the order of inheritance decides.
MODEL_SAMPLINGS = {
    "EPS": VE,
    "V_PREDICTION": VE,
    "EDM": VE,
    "X0": VE,
    "COSMOS_RFLOW": VE,
    "CONST": FLOW,
    "IMG_TO_IMG": None,
    "IMG_TO_IMG_FLOW": None,
}


def coordinates_of(model_sampling):
    """The `Coordinates` of one of the host's model samplings.

    Raises ValueError for a sampling without a Gaussian noise path (image-to-image bridges) and for an unknown one.
    """
    names = [c.__name__ for c in type(model_sampling).__mro__]
    known = next((n for n in names if n in MODEL_SAMPLINGS), None)
    coordinates = MODEL_SAMPLINGS.get(known)
    if coordinates is not None:
        return coordinates
    gaussian = ", ".join(n for n, c in MODEL_SAMPLINGS.items() if c is not None)
    reason = "has no Gaussian noise path" if known else "is not known here"
    raise ValueError(
        f"the model's sampling type {known or ' / '.join(names[:-1])} {reason}, so its log-density is undefined; "
        f"density guidance works with models of type {gaussian}")


def per_image(value, ndim):
    """Reshape a tensor (B,) to (B, 1, ...) with `ndim` dimensions; a 0-d tensor or float is returned as it is."""
    return value.reshape(-1, *[1] * (ndim - 1)) if torch.is_tensor(value) and value.ndim else value


def eps_from_denoised(x, denoised, sigma, alpha):
    """Noise prediction eps = (x - alpha * denoised) / sigma, shape of x; sigma and alpha broadcast as (B,) or 0-d."""
    return (x - per_image(alpha, x.ndim) * denoised) / per_image(sigma, x.ndim)


def score_from_eps(eps, s):
    """Score of y, -eps / s, shape of eps; s is (B,), 0-d or float."""
    return -eps / per_image(s, eps.ndim)


def log_snr(s):
    """lambda = -2 ln s, for a float or a tensor."""
    return -2 * (s.log() if torch.is_tensor(s) else math.log(s))

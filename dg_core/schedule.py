"""Noise schedules: one adapter from any Gaussian noise path to eps, score and log-SNR.

Forward process x = alpha * x0 + std * n with n ~ N(0, I). Dividing by alpha gives "variance-exploding" (VE) coordinates, in
which every model is the same:

symbol      name          definition
sigma       sigma         the noise level that the host passes to a model
alpha       alpha         weight of the image: 1 (VE) or 1 - sigma (flow matching)
std         std           weight of the noise: sigma times the model's noise scale, which is 1 but for few models
y           y             x / alpha
s           s             std / alpha, the noise level in VE coordinates
theta       theta         atan(s)
x0_hat      denoised      E[x0 | x], what the host's model(x, sigma) returns
eps         eps           (x - alpha * denoised) / std = (y - denoised) / s
lambda      log_snr       -2 ln s
D           dim           number of elements of one image

The score of y is -eps / s and the probability-flow ODE is dy/ds = eps.
Source: Karczewski, Heinonen, Garg, "Devil is in the Details: Density Guidance" (ICML 2025, arXiv 2502.05807).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch

Number = TypeVar("Number", float, torch.Tensor)

ROUNDING = 1e-6  # of float32 schedules, relative


@dataclass(frozen=True)
class Level:
    """One noise level of a path, in floats."""

    sigma: float
    alpha: float
    std: float

    @property
    def s(self) -> float:
        """VE noise level std / alpha; infinite where alpha is 0."""
        return self.std / self.alpha if self.alpha > 0 else math.inf

    @property
    def theta(self) -> float:
        """atan(s), pi / 2 where alpha is 0."""
        return math.atan2(self.std, self.alpha)

    @property
    def scale(self) -> float:
        """sqrt(alpha^2 + std^2): x = scale * u with u the variance-preserving state."""
        return math.hypot(self.alpha, self.std)

    def eps(self, x: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
        """Noise prediction (x - alpha * denoised) / std, shape of x."""
        return (x - self.alpha * denoised) / self.std


@dataclass(frozen=True)
class NoisePath:
    """How a model mixes image and noise.

    kind: "VE" (alpha = 1) or "flow" (alpha = 1 - sigma). noise_scale: std = noise_scale * sigma.
    """

    kind: str
    noise_scale: float = 1.0

    def alpha(self, sigma: Number) -> Number:
        """alpha at sigma; float or tensor, as sigma is."""
        return 1 - sigma if self.kind == "flow" else 1 - 0 * sigma

    def std(self, sigma: Number) -> Number:
        """Weight of the noise at sigma; float or tensor, as sigma is."""
        return sigma * self.noise_scale

    def at(self, sigma: float) -> Level:
        """The `Level` of a sigma."""
        return Level(sigma, self.alpha(sigma), self.std(sigma))

    def s(self, sigma: float) -> float:
        """VE noise level s = std / alpha; infinite where alpha is 0."""
        return self.at(sigma).s

    def sigma(self, s: float) -> float:
        """sigma at the VE noise level s, which may be infinite for a flow."""
        if self.kind == "flow":
            return s / (self.noise_scale + s) if math.isfinite(s) else 1.0
        return s / self.noise_scale


VE = NoisePath("VE")
FLOW = NoisePath("flow")


class Schedule:
    """Descending noise levels of one path.

    sigmas: floats. A rise within float32 rounding is flattened. Raises ValueError where one is not finite,
    negative or beyond pure noise, or where they ascend.
    """

    def __init__(self, path: NoisePath, sigmas: Sequence[float]):
        shown = brief(sigmas)
        if not all(math.isfinite(v) and v >= 0 for v in sigmas):
            raise ValueError(f"sigmas are {shown}; they must be finite and not negative")
        if any(path.alpha(v) < -ROUNDING for v in sigmas):
            raise ValueError(
                f"sigmas are {shown}; a flow model has none above 1, which is pure noise: connect this model to the scheduler"
            )
        if any(b > a * (1 + ROUNDING) for a, b in itertools.pairwise(sigmas)):
            raise ValueError(
                f"sigmas are {shown}; density guidance needs a schedule that only descends: to add noise to an image "
                "(unsampling), use a sampler without guidance"
            )
        self.path = path
        self.sigmas = list(itertools.accumulate(sigmas, min))

    @cached_property
    def levels(self) -> list[Level]:
        """One `Level` for each sigma."""
        return [self.path.at(sigma) for sigma in self.sigmas]

    @property
    def steps(self) -> int:
        """Number of steps, one less than there are sigmas."""
        return max(len(self.sigmas) - 1, 0)

    def next_theta(self, step: int) -> float:
        """theta of the next lower noise level after `step`; its own where there is none."""
        theta = self.levels[step].theta
        return next((level.theta for level in self.levels[step + 1 :] if level.theta < theta), theta)


def brief(values: Sequence[float]) -> list[float]:
    """The values rounded for a message: all of them, or the first and last three."""
    shown = values if len(values) < 9 else [*values[:3], *values[-3:]]
    return [round(v, 4) for v in shown]


def log_snr(s: float) -> float:
    """lambda = -2 ln s; -inf where s is infinite."""
    return -2 * math.log(s)

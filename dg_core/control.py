"""Density guidance: what steers a run.

Multiplying eps by eta steers log p along the sampling path, at no extra model call (arXiv 2502.05807, section 5):

    dy/ds = eta * eps,      eta = 1 + k / ||eps||^2,      k = sqrt(2 D) z,      z = Phi^-1(q)

The part of the log-density change that comes from it is known beforehand:

    shift = k ln(s_start / s_end)   nats over the guided steps

symbol            name                  unit
q                 quantile              1; 0.5 is neutral, below it more detail
z                 z                     1; standard normal quantile
k                 gain                  nats per unit of -ln s; 0 is neutral
eta - 1           eta_minus_one         1; 0 is neutral
s_start, s_end    GuidedSteps           noise levels in VE coordinates
shift             -                     nats, positive = smoother
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from .schedule import ROUNDING, NoisePath, Schedule
from .statistics import compute_dtype, per_image, squared_norm
from .units import bits_per_dim_to_nats, quantile_to_z

# A flow model's state at a smaller alpha is noise alone: float32 schedules may begin at sigma = 1 less a rounding, where
# s = 1.7e7 would stretch the guided range by a step that changes nothing.
LEAST_ALPHA = 1e-6
_LEAST_NORM2 = 1e-24  # of eps; an image without noise is not guided

# The peak of a Gaussian lies 1 / (2 ln 2) = 0.72 bits per dimension below its typical samples. Guidance that asks for
# more meets a score of zero, and overshoots.
SMOOTHEST = -0.65


@dataclass(frozen=True)
class GuidedSteps:
    """The guided steps of a schedule: `first` to `last - 1`, from s_start down to s_end.

    A step is guided where its starting sigma lies in the wanted window and its end is not zero noise: the last
    denoising step to sigma = 0 has no log-density to steer, and a call at alpha = 0 has no score.
    """

    first: int
    last: int
    sigma_start: float
    sigma_end: float
    s_start: float
    s_end: float

    @property
    def log_range(self) -> float:
        """ln(s_start / s_end)."""
        return math.log(self.s_start / self.s_end)

    def start_at(self, sigma: torch.Tensor) -> torch.Tensor:
        """Whether a step that begins at sigma is guided, bool in the shape of sigma.

        Allows for samplers that recompute sigma from its logarithm, for the rounding of narrow dtypes, and for samplers that
        go above the first sigma of their schedule (churn).
        """
        margin = 1 + max(1e-4, torch.finfo(sigma.dtype).eps)
        high = math.inf if self.first == 0 else self.sigma_start * margin
        return (sigma > self.sigma_end * margin) & (sigma <= high)


def guided_steps(schedule: Schedule, sigma_high: float = math.inf, sigma_low: float = 0.0) -> GuidedSteps | None:
    """The `GuidedSteps` of a schedule, those that start at sigma_low < sigma <= sigma_high; None where there are none."""
    # Schedules are float32: a window edge that should meet one of them may miss it by a rounding.
    low, high = sigma_low * (1 + ROUNDING), sigma_high * (1 + ROUNDING)
    levels = schedule.levels
    steps = [
        i for i, (a, b) in enumerate(zip(levels, levels[1:])) if low < a.sigma <= high and b.sigma > 0 and a.alpha > LEAST_ALPHA
    ]
    if not steps:
        return None
    first, last = steps[0], steps[-1] + 1
    return GuidedSteps(first, last, levels[first].sigma, levels[last].sigma, levels[first].s, levels[last].s)


def gain_of(quantile: float, detail_shift: float, dim: float, log_range: float, peak: float = 1.0) -> tuple[float, bool]:
    """(k in nats per -ln s, whether it was limited to `SMOOTHEST`) for a quantile plus a shift in bits per dimension.

    detail_shift > 0 means more detail, a lower log-density and so a smaller gain. dim: D; 0 of it gives 0. log_range: that of
    the `GuidedSteps`. peak: the largest value of a `strength_curve`.
    Raises ValueError where the shift would take more than the whole of eps: |eta - 1| > 1 at the typical ||eps||^2 = D.
    """
    if not dim:
        return 0.0, False
    limit = log_range / math.log(2) / peak
    if abs(detail_shift) > limit:
        raise ValueError(
            f"detail_shift is {detail_shift}, but the guided part of the schedule is too short for it: it can shift by "
            f"{limit:.3g} bits per dimension at most; guide a wider range (start_percent, end_percent), or ask for less"
        )
    wanted = (2 * dim) ** 0.5 * quantile_to_z(quantile) + bits_per_dim_to_nats(detail_shift, dim) / log_range
    smoothest = bits_per_dim_to_nats(SMOOTHEST, dim) / log_range
    return min(wanted, smoothest), wanted > smoothest


def strength_curve(values: Sequence[float]) -> tuple[float, ...]:
    """`values` scaled so that the curve through them, evenly spaced and joined by lines, has the mean 1.

    They say how strongly guidance acts in each part of the guided range; with mean 1 the predicted shift stays the same.
    Raises ValueError unless they are finite, not negative and not all zero.
    """
    if not all(math.isfinite(v) and v >= 0 for v in values) or not any(values):
        raise ValueError(f"curve is {list(values)}; its numbers must be finite and not negative, and at least one above 0")
    if len(values) == 1:
        return (1.0,)
    mean = (sum(values) - (values[0] + values[-1]) / 2) / (len(values) - 1)
    return tuple(v / mean for v in values)


class Steering(Protocol):
    """What a solver or a wrapper asks of a control, see `Control`."""

    @property
    def steps(self) -> GuidedSteps:
        """The guided steps."""
        ...

    @property
    def weights(self) -> torch.Tensor | None:
        """Weights of the elements, see `Control`; None counts all alike."""
        ...

    @property
    def nodes(self) -> int:
        """How many values of eta - 1 a solver extrapolates; 1 where each answers to the one before."""
        ...

    def eta_minus_one(self, eps_norm2: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """eta - 1 of every image, (B,), from ||eps||^2 (B,) and the VE noise levels s, (B,) or (1,)."""
        ...


@dataclass(frozen=True)
class Control:
    """What steers a run by a gain that is known beforehand.

    Its tensors are on the device of the run, so a step copies nothing there.

    steps: the `GuidedSteps`. gain: k, one for all images or one for each, (B,). weights: None, or a number from 0 to 1 for
    each element, broadcastable to x: how strongly it is guided and how much it counts in D and ||eps||^2. The shift stays
    what is predicted: the rate <score, k w eps> holds <w eps, eps> just as the norm does. curve: None, or the values (K,) of
    a `strength_curve`, evenly spaced in ln s over the guided steps.
    """

    steps: GuidedSteps
    gain: float | torch.Tensor
    weights: torch.Tensor | None = None
    curve: torch.Tensor | None = None
    nodes: ClassVar[int] = 2

    def eta_minus_one(self, eps_norm2: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """eta - 1 = k curve(s) / ||eps||^2 of every image, (B,), in a guided step.

        eps_norm2: `squared_norm` of eps with the weights, (B,). s: VE noise levels, (B,) or (1,).
        Raises ValueError where there is a gain for each image of another batch.
        """
        # A float becomes a tensor, so that a gain is divided alike, whether it is that of all images or of each.
        gain = self.gain if isinstance(self.gain, torch.Tensor) else torch.full_like(eps_norm2, self.gain)
        if len(gain) not in (1, len(eps_norm2)):
            raise ValueError(
                f"gain has {len(gain)} numbers and the batch has {len(eps_norm2)} images; give one number for all, or "
                f"{len(eps_norm2)}"
            )
        eta = gain / eps_norm2.clamp_min(_LEAST_NORM2)
        return eta if self.curve is None else eta * curve_at(self.curve, self.steps, s)


def curve_at(curve: torch.Tensor, steps: GuidedSteps, s: torch.Tensor) -> torch.Tensor:
    """The curve, values (K,) evenly spaced in ln s over the guided steps, at the noise levels s (...)."""
    last = len(curve) - 1
    position = ((math.log(steps.s_start) - s.log()) / steps.log_range).clamp(0, 1) * last
    distance = (position.unsqueeze(-1) - torch.arange(last + 1, dtype=s.dtype, device=s.device)).abs()
    return ((1 - distance).clamp_min(0) * curve).sum(-1)


def guided_prediction(
    control: Steering, path: NoisePath, x: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The prediction whose Euler step follows the guided ODE, shape and dtype of denoised:

        denoised~ = denoised - (eta - 1) w (y - denoised)

    x, denoised: (B, ...). sigma: (B,) or (1,). Outside the guided steps the prediction keeps its values. Works in float32 or
    wider, on x's device, in three passes over the latent with one temporary that serves as std * eps and as the result.
    """
    wide = compute_dtype(x.dtype)
    inside = control.steps.start_at(sigma)
    result_dtype, x, denoised, sigma = denoised.dtype, x.to(wide), denoised.to(wide), sigma.to(wide)
    alpha, std = path.alpha(sigma), path.std(sigma)
    noise = torch.addcmul(x, denoised, per_image(alpha, x.ndim), value=-1)  # std * eps
    eta = control.eta_minus_one(squared_norm(noise, control.weights) / std.square(), std / alpha)
    strength = torch.where(inside & (alpha > LEAST_ALPHA), eta / alpha, 0.0)
    if control.weights is not None:
        noise.mul_(control.weights)
    return torch.addcmul(denoised, noise, per_image(strength, x.ndim), value=-1, out=noise).to(result_dtype)

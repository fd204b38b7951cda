"""Density guidance by quantile: the formulas.

Multiplying eps by eta steers log p along the sampling path at no extra model call (arXiv 2502.05807, section 5):

    dy/ds = eta * eps,      eta = 1 + sqrt(2 D) z / ||eps||^2,      z = Phi^-1(q)

The part of the log-density change that comes from it is known beforehand:

    shift = sqrt(2 D) z ln(s_start / s_end)   nats over the guided range

symbol            name                  unit
q                 quantile              1; 0.5 is neutral, below it more detail
z                 z                     1; standard normal quantile
eta - 1           eta_minus_one         1; 0 is neutral
s_start, s_end    GuidedRange           noise levels in VE coordinates
shift             predicted_shift       nats, positive = smoother
"""

import math
from dataclasses import dataclass

import torch

from .statistics import compute_dtype, squared_norm
from .units import bits_per_dim_to_nats, quantile_to_z


ROUNDING = 1e-6  # of float32 schedules, relative

# A flow model's state at a smaller alpha is noise alone: float32 schedules may begin at sigma = 1 less a rounding, where
# s = 1.7e7 would stretch the guided range by a step that changes nothing.
LEAST_ALPHA = 1e-6
_LEAST_NORM = 1e-12  # of sigma eps; an image without noise is not guided


@dataclass(frozen=True)
class GuidedRange:
    """The guided steps of a schedule: steps `first` to `last - 1`, from s_start down to s_end.

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
    def log_range(self):
        """ln(s_start / s_end), 0 when no step is guided."""
        return math.log(self.s_start / self.s_end) if self.last > self.first else 0.0


def guided_range(sigmas, coordinates, sigma_high=math.inf, sigma_low=0.0):
    """The `GuidedRange` of a schedule: steps that start at sigma_low < sigma <= sigma_high.

    sigmas: floats, descending, in the units of the host. Raises ValueError if they are not finite, ascend, or go beyond pure
    noise.
    """
    if not all(math.isfinite(v) and v >= 0 for v in sigmas):
        raise ValueError(f"sigmas are {_brief(sigmas)}; they must be finite and not negative")
    if any(coordinates.alpha(v) < -ROUNDING for v in sigmas):
        raise ValueError(
            f"sigmas are {_brief(sigmas)}; a flow model has none above 1, which is pure noise: connect a scheduler with this "
            "model")
    if any(b > a * (1 + ROUNDING) for a, b in zip(sigmas, sigmas[1:])):
        raise ValueError(
            f"sigmas are {_brief(sigmas)}; density guidance needs a schedule that only descends "
            "(for adding noise to an image, use the sampler without it)")
    # Schedules are float32: a window edge that should meet one of them may miss it by a rounding.
    steps = [i for i, (a, b) in enumerate(zip(sigmas, sigmas[1:]))
             if sigma_low * (1 + ROUNDING) < a <= sigma_high * (1 + ROUNDING) and b > 0 and coordinates.alpha(a) > LEAST_ALPHA]
    if not steps:
        return GuidedRange(0, 0, 0.0, 0.0, 1.0, 1.0)
    first, last = steps[0], steps[-1] + 1
    return GuidedRange(first, last, sigmas[first], sigmas[last], coordinates.s(sigmas[first]), coordinates.s(sigmas[last]))


def _brief(sigmas):
    return [round(v, 4) for v in sigmas] if len(sigmas) < 9 else [round(v, 4) for v in (*sigmas[:3], *sigmas[-3:])]


def z_value(quantile, detail_shift, dim, log_range, peak=1.0):
    """z of a quantile plus a wanted shift in bits per dimension over the guided range.

    detail_shift > 0 means more detail, a lower log-density and so a smaller z. `dim` is D; 0 of it gives z = 0. `peak`: the
    largest value of a `strength_curve`.
    Raises ValueError where the shift would take more than the whole of eps: |eta - 1| > 1 at the typical ||eps||^2 = D.
    """
    if not dim:
        return 0.0
    z = quantile_to_z(quantile)
    if detail_shift and log_range:
        limit = log_range / math.log(2) / peak
        if abs(detail_shift) > limit:
            raise ValueError(
                f"detail_shift is {detail_shift}, but the guided part of the schedule is too short for it (ln(s_start / "
                f"s_end) = {log_range:.3g}); it can shift by {limit:.3g} at most: guide a wider range, or ask for less")
        z = z + bits_per_dim_to_nats(detail_shift, dim) / ((2 * dim) ** 0.5 * log_range)
    return z


# The peak of a Gaussian lies 1 / (2 ln 2) = 0.72 bits per dimension below its typical samples. Guidance that asks for
# more meets a score of zero, and overshoots.
SMOOTHEST = -0.65


def limit_smoothing(z, dim, log_range):
    """z, but at most the one whose predicted shift is `SMOOTHEST` bits per dimension; floats."""
    if not log_range or not dim:
        return z
    return min(z, bits_per_dim_to_nats(SMOOTHEST, dim) / ((2 * dim) ** 0.5 * log_range))


def predicted_shift(z, dim, log_range):
    """Log-density that guidance adds over the guided range, in nats."""
    return (2 * dim) ** 0.5 * z * log_range


def gain(z, dim, like):
    """sqrt(2 D) z, 0-d or (B,) as z and dim are, float64 rounded once to the dtype of `like` and on its device.

    An image's gain is the same number whether z is its own or that of the whole batch.
    """
    z, dim = (torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (z, dim))
    return ((2 * dim).sqrt() * z).to(like)


def eta_minus_one(eps_norm2, gain):
    """eta - 1 = sqrt(2 D) z / ||eps||^2 of every image, (B,). Zero where eps is zero."""
    return torch.where(eps_norm2 > 0, gain / eps_norm2, 0.0)


def strength_curve(values):
    """`values` scaled so that the curve through them, evenly spaced and joined by lines, has the mean 1.

    They say how strongly guidance acts at each part of the guided range, which the mean leaves at the same predicted shift.
    Raises ValueError unless they are finite, not negative and not all zero.
    """
    if not all(math.isfinite(v) and v >= 0 for v in values) or not any(values):
        raise ValueError(f"curve is {list(values)}; its numbers must be finite and not negative, and one must be above 0")
    if len(values) == 1:
        return (1.0,)
    mean = (sum(values) - (values[0] + values[-1]) / 2) / (len(values) - 1)
    return tuple(v / mean for v in values)


def curve_at(curve, guided, s):
    """The curve, a tensor (K,) of values evenly spaced in ln s over the guided range, at the noise levels s (...)."""
    last = len(curve) - 1
    position = ((math.log(guided.s_start) - s.log()) / guided.log_range).clamp(0, 1) * last
    distance = (position.unsqueeze(-1) - torch.arange(last + 1, dtype=s.dtype, device=s.device)).abs()
    return ((1 - distance).clamp_min(0) * curve).sum(-1)


class PredictionGuide:
    """Turns a denoised prediction into the one whose Euler step follows the guided ODE.

        denoised~ = denoised - (eta - 1) (y - denoised)

    One guide serves one run. A step costs three passes over the latent, with one temporary that serves as sigma * eps and
    as the result, and some work on the numbers of each image. On a CPU that work is done on floats, since small tensor
    operations take as long as a pass; elsewhere reading a number would wait for the device.
    """

    def __init__(self, coordinates, z, dim, guided, weights=None, curve=None):
        """z, dim: float or (B,). guided: the `GuidedRange`. weights: None, or a number from 0 to 1 for each element,
        broadcastable to x: how strongly it is guided and how much it counts in D and ||eps||^2. The control's part of the
        log-density stays what is predicted: the rate <score, gain w eps> holds <w eps, eps> just as the norm does.
        curve: None, or a `strength_curve`."""
        self._slope = coordinates.slope
        self._guided = guided
        self._z, self._dim = z, dim
        self._weights = weights
        self._curve = curve
        self._guide = None

    def __call__(self, x, denoised, sigma):
        """The guided prediction: x, denoised (B, ...), sigma (B,) -> shape and dtype of denoised.

        Outside the guided range the prediction keeps its values. Everything stays on x's device, in float32 or wider.
        """
        if self._guide is None:
            self._prepare(x, sigma)
        if x.dtype is denoised.dtype is self._dtype:
            return self._guide(x, denoised, sigma)
        return self._guide(x.to(self._dtype), denoised.to(self._dtype), sigma).to(denoised.dtype)

    def _prepare(self, x, sigma):
        self._dtype = compute_dtype(x.dtype)
        # The margins allow for samplers that recompute sigma from its logarithm, and for the rounding of narrow dtypes.
        margin = 1 + max(1e-4, torch.finfo(sigma.dtype).eps)
        self._low = self._guided.sigma_end * margin
        # A sampler that churns goes above the first sigma of its schedule. alpha = 0 is never guided.
        self._high = math.inf if self._guided.first == 0 else self._guided.sigma_start * margin
        if self._slope:
            self._high = min(self._high, (1 - LEAST_ALPHA) / self._slope)
        if x.device.type == "cpu" and self._weights is None and self._curve is None:
            self._guide = self._image_by_image
            z, dim = (v.tolist() if torch.is_tensor(v) else [v] for v in (self._z, self._dim))
            count = max(len(z), len(dim))
            self._gains = [(2 * d) ** 0.5 * v for v, d in zip(_listed(z, count), _listed(dim, count))]
            return
        self._guide = self._all_at_once
        self._column = (-1, *[1] * (x.ndim - 1))
        self._gains = gain(self._z, self._dim, x.new_empty((), dtype=self._dtype)).view(self._column)
        if self._curve is not None:
            self._curve = torch.tensor(self._curve, dtype=self._dtype, device=x.device)

    def _image_by_image(self, x, denoised, sigma):
        sigmas, gains = sigma.tolist(), self._gains
        if len(x) == len(sigmas) == len(gains) == 1:
            return self._guide_image(x, denoised, sigmas[0], gains[0])
        sigmas, gains = _listed(sigmas, len(x)), _listed(gains, len(x))
        guided = torch.empty_like(denoised)
        for image in zip(x, denoised, sigmas, gains, guided, strict=True):
            self._guide_image(*image)
        return guided

    def _guide_image(self, x, denoised, sigma, gain, out=None):
        """One image, of any shape, with a sigma and a gain that are floats."""
        if not self._low < sigma <= self._high:
            return denoised if out is None else out.copy_(denoised)
        alpha = 1 - self._slope * sigma
        noise = torch.sub(x, denoised, alpha=alpha, out=out)  # sigma eps
        norm = torch.linalg.vector_norm(noise).tolist()  # unlike BLAS's dot the same wherever in memory the image lies
        return torch.sub(denoised, noise, alpha=gain * (sigma / max(norm, _LEAST_NORM)) ** 2 / alpha, out=noise)

    def _all_at_once(self, x, denoised, sigma):
        sigma = sigma.to(self._dtype).view(self._column)
        alpha = 1 - self._slope * sigma
        noise = torch.addcmul(x, denoised, alpha, value=-1)  # sigma eps
        norm2 = squared_norm(noise, self._weights).view(self._column).clamp_min_(_LEAST_NORM**2)
        strength = self._gains * sigma.square() / (alpha * norm2)
        if self._curve is not None:
            strength = strength * curve_at(self._curve, self._guided, sigma / alpha)
        inside = (self._low < sigma) & (sigma <= self._high)
        if self._weights is not None:
            noise.mul_(self._weights)
        return torch.addcmul(denoised, noise, strength.where(inside, 0.0), value=-1, out=noise)


def _listed(values, count):
    """A list of one number, `count` times; one of `count` numbers as it is. Raises ValueError for any other."""
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise ValueError(f"{len(values)} numbers for a batch of {count} images; give one for all, or {count}")
    return values

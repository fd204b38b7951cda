"""Prior guidance: scale the starting noise to a quantile of its own log-density.

log N(n; 0, I) falls with ||n||, and ||n||^2 of D numbers is chi-square with D degrees of freedom. The log-density
quantile q of the prior is therefore the norm r = chi.ppf(1 - q, D): above 0.5 a smaller norm, a higher density and a
smoother image. Source: arXiv 2502.05807, section 3.
"""

import numpy as np
import scipy.stats
import torch

from .statistics import dimension, region_of, scale_images, squared_norm
from .units import require_quantile


def prior_norm(quantile: float, dim: float | np.ndarray) -> float | np.ndarray:
    """Norm ||n|| at the log-density quantile `quantile` in (0, 1) of D = `dim` standard normal numbers.

    `dim` may be an array; the result has its shape. Raises ValueError unless 0 < quantile < 1.
    """
    return scipy.stats.chi.isf(require_quantile(quantile), dim)


def scale_noise(
    noise: torch.Tensor, quantile: float | None = None, scale: float = 1.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Scale each image of `noise` (B, ...) to the norm of `quantile` (None: leave it), then by `scale`.

    Only elements with a positive `mask` (broadcastable to `noise`) count and change. An image whose noise is zero
    is left alone. Returns a new tensor of the same dtype; norms are float64.
    """
    wide = noise.double()
    region = None if mask is None else region_of(mask).double()
    if quantile is None:
        factor = torch.full((len(noise),), float(scale), dtype=torch.float64, device=noise.device)
    else:
        norm = squared_norm(wide, region).sqrt()
        target = torch.as_tensor(prior_norm(quantile, np.array(dimension(wide, region)))).to(norm)
        factor = torch.where(norm > 0, scale * target / norm, 1.0)
    scaled = scale_images(wide, factor)
    if region is not None:
        scaled = torch.where(region.expand_as(wide) > 0, scaled, wide)
    return scaled.to(noise.dtype)

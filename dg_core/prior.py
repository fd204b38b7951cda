"""Prior guidance: scale the starting noise to a quantile of its own log-density.

log N(n; 0, I) falls with ||n||, and ||n||^2 of D numbers is chi-square with D degrees of freedom. The log-density
quantile q of the prior is therefore the norm r = chi.ppf(1 - q, D): above 0.5 a smaller norm, a higher density and a
smoother picture. Source: arXiv 2502.05807, section 3.
"""

import scipy.stats
import torch

from .statistics import dimension, region_of, scale_images, squared_norm
from .units import require_quantile


def prior_norm(quantile, dim):
    """Norm ||n|| at the log-density quantile `quantile` in (0, 1) of D = `dim` standard normal numbers.

    `dim` may be an array; the result has its shape. Raises ValueError unless 0 < quantile < 1.
    """
    return scipy.stats.chi.isf(require_quantile(quantile), dim)


def scale_noise(noise, quantile=None, scale=1.0, mask=None):
    """Scale each image of `noise` (B, ...) to the norm of `quantile` (None: leave it), then by `scale`.

    Only elements with a positive `mask` (broadcastable to `noise`) count and change. An image whose noise is zero
    is left alone. Returns a new tensor of the same dtype; norms are float64.
    """
    wide = noise.double()
    region = None if mask is None else region_of(mask).double()
    if quantile is None:
        factor = torch.full((len(noise),), float(scale), dtype=torch.float64, device=noise.device)
    else:
        dim = dimension(wide, region)
        target = torch.as_tensor(prior_norm(quantile, dim.cpu().numpy() if torch.is_tensor(dim) else dim))
        norm = squared_norm(wide, region).sqrt()
        factor = torch.where(norm > 0, scale * target.to(norm) / norm, 1.0)
    scaled = scale_images(wide, factor)
    if region is not None:
        scaled = torch.where(region.expand_as(wide) > 0, scaled, wide)
    return scaled.to(noise.dtype)

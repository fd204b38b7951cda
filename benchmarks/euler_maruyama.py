"""Euler-Maruyama for the SDE of `dg_core.variation`, with everything exact: what other schemes are compared to."""

import torch

from ..dg_core.variation import inner


def euler_maruyama(density, y, levels, strength, generator):
    """y in VE coordinates at levels[0], taken down the noise levels s (floats), one model call per step.

        y' = y + (s' - s) eta eps + c sqrt(s^2 - s'^2) P xi,
        eta = 1 + c^2 s (div eps - <eps, J eps> / ||eps||^2) / ||eps||^2

    with the exact Laplacian and Hessian of an `ExactDensity` (arXiv 2502.05807, section 6, with the term that it drops).
    """
    for s, s_next in zip(levels, levels[1:]):
        eps = (y - density.denoised(y, s)) / s
        norm2 = inner(eps, eps)
        divergence = -s * density.laplacian(y, s).view_as(norm2)
        along = inner(eps, -s * density.hessian_product(y, s, eps)) / norm2
        eta = 1 + strength**2 * s * (divergence - along) / norm2
        xi = torch.randn(y.shape, dtype=y.dtype, generator=generator)
        noise = strength * (s**2 - s_next**2) ** 0.5 * (xi - inner(xi, eps) / norm2 * eps)
        y = y + (s_next - s) * eta * eps + noise
    return y

"""Euler-Maruyama for the SDE of `dg_core.variation`, with everything exact: what other schemes are compared to."""

import numpy as np
import torch

from ..dg_core import solver
from ..dg_core.control import guided_steps
from ..dg_core.schedule import Schedule
from ..dg_core.statistics import inner
from ..nodes.host.model_access import path_of
from ..nodes.host.variation_run import WINDOWS


def euler_maruyama(density, y, levels, strength, generator):
    """y in VE coordinates at levels[0], taken down the noise levels s (floats), one model call per step.

        y' = y + (s' - s) eta eps + c sqrt(s^2 - s'^2) P xi,
        eta = 1 + c^2 s (div eps - <eps, J eps> / ||eps||^2) / ||eps||^2

    with the exact Laplacian and Hessian of an `ExactDensity` (arXiv 2502.05807, section 6, with the term it drops).
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


def fine_details_change(model, sigmas, strength, calls, variations):
    """Change of log-density per dimension against the deterministic run, in nats, (variations,).

    The pack's own solver down to the window of "fine details", and there Euler-Maruyama with as many steps, equally
    long in log-SNR between the sigmas of the schedule, as are left of `calls` model calls. model: the exact-density one.
    """
    density, sampling = model.model.density, model.get_model_object("model_sampling")
    path = path_of(sampling)
    high, low = (sampling.percent_to_sigma(p) for p in WINDOWS["fine details"][path.kind])
    first = guided_steps(Schedule(path, sigmas), high, low).first
    noise = torch.randn(1, 3, density.size, density.size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def predict(x, sigma):
        alpha = max(path.alpha(sigma), 1e-8)
        return density.denoised(x / alpha, sigma / alpha)

    def solve(x, sigmas):
        return solver.solve(predict, x, Schedule(path, sigmas))

    s = [path.s(v) for v in sigmas[first:]]
    places = np.linspace(0, len(s) - 1, calls - first + 1)
    levels = np.exp(np.interp(places, range(len(s)), np.log(s))).tolist()
    y = solve(noise * sigmas[0], sigmas[: first + 1]) / path.alpha(sigmas[first])
    y = euler_maruyama(density, y.expand(variations, -1, -1, -1), levels, strength, torch.Generator().manual_seed(3))
    plain = solve(noise * sigmas[0], sigmas) / path.alpha(sigmas[-1])
    return (density.log_prob(y, s[-1]) - density.log_prob(plain, s[-1])) / density.dim

"""The guided flow of a single Gaussian, to which samplers are compared.

In the eigenbasis of the covariance the guided flow is one scalar equation for each eigenvalue, coupled through
||eps||^2 alone. It is integrated by scipy to 1e-10: the converged result. Without guidance it has the closed form
y(s) = m + (y(s_0) - m) sqrt((c^2 + s^2) / (c^2 + s_0^2)).
"""

import math

import torch
from scipy.integrate import solve_ivp

from ..dg_core.exact_density import dct


class GaussianOracle:
    """One component of an `ExactDensity`: means and variances in its eigenbasis, float64."""

    def __init__(self, density, component):
        factor = density.means.new_zeros(density.dim, density.factors.shape[1])
        factor[density.low_slots] = density.factors[component].T
        # The factor spans at most r directions of each band; the rest of a band is isotropic.
        basis = density.means.new_zeros(density.dim, density.dim)
        spanned = torch.zeros(density.dim, dtype=torch.bool)
        start = 0
        for slots in (torch.nonzero(density.index == j)[:, 0] for j in density.index.unique()):
            block, _ = torch.linalg.qr(factor[slots], mode="complete")
            basis[slots, start : start + len(slots)] = block
            spanned[start : start + min(len(slots), factor.shape[1])] = True
            start += len(slots)
        self.variance = density.band_variance[density.index] @ basis.square()
        inner = basis[:, spanned].T @ factor
        values, vectors = torch.linalg.eigh(torch.diag(self.variance[spanned]) + inner @ inner.T)
        basis[:, spanned] = basis[:, spanned] @ vectors
        self.variance[spanned] = values
        self.basis = basis  # (D, D), columns are eigenvectors
        self.mean = density.means[component] @ self.basis
        self.dim = density.dim

    def coefficients(self, y):
        """Images (B, 3, N, N) in the eigenbasis, centred: (B, D)."""
        return dct(y.double()).flatten(1) @ self.basis - self.mean

    def log_prob(self, centred, s):
        """log p_s in nats, (B,)."""
        v = self.variance + s**2
        return -0.5 * (centred.square() / v + (2 * math.pi * v).log()).sum(1)

    def unguided(self, centred, s_from, s_to):
        """The flow without guidance; s_from may be infinite, then `centred` is the unit noise."""
        if math.isinf(s_from):
            return centred * (self.variance + s_to**2).sqrt()
        return centred * ((self.variance + s_to**2) / (self.variance + s_from**2)).sqrt()

    def guided(self, centred, s_from, s_to, z):
        """The flow with quantile control from s_from to s_to, both finite."""
        k = (2 * self.dim) ** 0.5 * z

        def rate(log_s, flat):
            s = math.exp(log_s)
            y = torch.from_numpy(flat).view_as(centred)
            eps = s * y / (self.variance + s**2)
            return (s * (1 + k / eps.square().sum(1, keepdim=True)) * eps).flatten().numpy()

        solution = solve_ivp(
            rate, (math.log(s_from), math.log(s_to)), centred.flatten().numpy(), method="DOP853", rtol=1e-10, atol=1e-12
        )
        return torch.from_numpy(solution.y[:, -1]).view_as(centred)

    def converged(self, noise, schedule, path, z):
        """Centred coefficients at the last non-zero sigma of `schedule`, guided as the pack guides.

        noise: unit noise (B, 3, N, N), or the host's initial x divided by its sigma.
        """
        s = [path.s(v) for v in schedule if v > 0]
        unit = dct(noise.double()).flatten(1) @ self.basis
        if math.isinf(s[0]):
            return self.guided(self.unguided(unit, s[0], s[1]), s[1], s[-1], z)
        return self.guided(unit * s[0] - self.mean, s[0], s[-1], z)

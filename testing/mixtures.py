"""Hand-made densities: small mixtures of Gaussians with full covariances, exact at every noise level."""

import math

import torch


class Mixture:
    """sum_k weights_k N(means_k, covariances_k) in float64: one density for all images, or one for each of them.

    weights (M, K), means (M, K, D), covariances (M, K, D, D), with M = 1 or the number of images B.
    """

    def __init__(self, weights, means, covariances):
        self.log_weights = torch.as_tensor(weights, dtype=torch.float64).log()
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.variances, self.bases = torch.linalg.eigh(torch.as_tensor(covariances, dtype=torch.float64))

    @classmethod
    def random(cls, count, components, dim, generator):
        """`count` densities.

        Means about 1.5 sqrt(D) from zero, variances from 0.003 to 1, of different sizes by component.
        """
        normal = lambda *shape: torch.randn(count, components, *shape, dtype=torch.float64, generator=generator)
        uniform = lambda *shape: torch.rand(count, components, *shape, dtype=torch.float64, generator=generator)
        basis = torch.linalg.qr(normal(dim, dim)).Q
        variances = 10 ** (-2 * uniform(1)) * (0.3 + 0.7 * uniform(dim))
        weights = 0.2 + uniform()
        return cls(weights / weights.sum(1, keepdim=True), 1.5 * normal(dim), basis @ torch.diag_embed(variances) @ basis.mT)

    def _parts(self, y, s):
        """Joint log-densities (B, K), and the scores of the components (B, K, D)."""
        variance = self.variances + s**2
        centred = ((y[:, None] - self.means)[..., None, :] @ self.bases)[..., 0, :]
        joint = self.log_weights - 0.5 * (centred.square() / variance + (2 * math.pi * variance).log()).sum(-1)
        return joint, -(self.bases @ (centred / variance)[..., None])[..., 0]

    def log_prob(self, y, s):
        """log p_s(y) in nats, (B,), for y (B, D) in VE coordinates."""
        return self._parts(y, s)[0].logsumexp(-1)

    def score(self, y, s):
        """grad log p_s(y), (B, D)."""
        joint, scores = self._parts(y, s)
        return (joint.softmax(-1)[..., None] * scores).sum(1)

    def denoised(self, x, sigma, path):
        """E[x0 | x], (B, D), for x in the host's units: where a flow has alpha = 0, the mean of the density."""
        alpha = path.alpha(sigma)
        if alpha == 0:
            return (self.log_weights.exp()[..., None] * self.means).sum(1).expand_as(x)
        s = path.s(sigma)
        return x / alpha + s**2 * self.score(x / alpha, s)

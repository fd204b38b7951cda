"""Small mixtures of Gaussians with full covariances, exact at every noise level and differentiable: hand-made densities."""

import math

import torch


class Mixture:
    """sum_k weights_k N(means_k, covariances_k) in float64: weights (K,), means (K, D), covariances (K, D, D)."""

    def __init__(self, weights, means, covariances):
        self.log_weights = torch.as_tensor(weights, dtype=torch.float64).log()
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.variances, self.bases = torch.linalg.eigh(torch.as_tensor(covariances, dtype=torch.float64))

    @classmethod
    def random(cls, components, dim, generator):
        """Means two to three units apart, and variances from 0.01 to 1 whose size differs between the components."""
        normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
        uniform = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=generator)
        basis = torch.linalg.qr(normal(components, dim, dim)).Q
        spread = 10 ** (-2 * uniform(components, 1)) * (0.3 + 0.7 * uniform(components, dim))
        covariances = basis @ torch.diag_embed(spread) @ basis.mT
        weights = 0.2 + uniform(components)
        return cls(weights / weights.sum(), 1.5 * normal(components, dim), covariances)

    def _parts(self, y, s):
        """Joint log-densities (B, K), and the scores of the components (B, K, D)."""
        variance = self.variances + s**2
        centred = torch.einsum("bkd,kde->bke", y[:, None] - self.means, self.bases)
        joint = self.log_weights - 0.5 * (centred.square() / variance + (2 * math.pi * variance).log()).sum(-1)
        return joint, -torch.einsum("bke,kde->bkd", centred / variance, self.bases)

    def log_prob(self, y, s):
        """log p_s(y) in nats, (B,), for y (B, D) in VE coordinates."""
        return self._parts(y, s)[0].logsumexp(-1)

    def score(self, y, s):
        """grad log p_s(y), (B, D)."""
        joint, scores = self._parts(y, s)
        return (joint.softmax(-1)[..., None] * scores).sum(1)

    def denoised(self, y, s):
        """E[x0 | y], (B, D). Where s is infinite: the mean of the density."""
        if math.isinf(s):
            return (self.log_weights.exp() @ self.means).expand_as(y)
        return y + s**2 * self.score(y, s)

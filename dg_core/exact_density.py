"""A density over small images that is known exactly at every noise level.

A mixture of K low-rank Gaussians in the orthonormal DCT domain, all with the same texture spectrum:

    p(c) = sum_k w_k N(c; m_k, diag(lam) + W_k^T W_k),      c = DCT(y)

Adding noise of level s adds s^2 to `lam`, so log p_s, score, Laplacian and Hessian products have closed forms
(Woodbury identity) at any s >= 0. Dropping the high DCT frequencies of the mixture gives the exact marginal at a
smaller image size, so one file serves all sizes.

symbol      name              meaning
y, s        y, s              VE coordinates, see `schedule`
lam         band_variance     texture variance of DCT band j
m_k, W_k    means, factors    mean and low-rank factor of component k
P           precision         1 / (lam + s^2)
M_k         -                 I + W_k P W_k^T, the r x r matrix of the Woodbury identity
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.fft
import torch
from safetensors import safe_open

from .units import nats_to_bits_per_dim

# VE noise levels, one for each image or one for all
Levels = torch.Tensor | float

BAND_EDGES = (0, 1.5, 2.5, 3.5, 4.5, 6, 8, 10, 13, 16, 20, 24, 28, 32, 38, 46, 56, 72, 100)
CHANNELS = 3


def dct_matrix(n: int) -> torch.Tensor:
    """The orthonormal DCT-II of n numbers, (n, n), float64."""
    matrix = scipy.fft.dct(np.eye(n), axis=0, norm="ortho")
    with torch.inference_mode(False):  # the host's nodes run in it, and an inference tensor fails in autograd
        return torch.from_numpy(matrix)


def dct(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal DCT-II over channels, rows and columns: (..., C, H, W) -> (..., C, H, W)."""
    return _transformed(x, [dct_matrix(n).to(x) for n in x.shape[-3:]])


def _transformed(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    for dim, matrix in zip((-3, -2, -1), matrices):
        x = torch.movedim(torch.movedim(x, dim, -1) @ matrix.T, -1, dim)
    return x


def band_index(size: int) -> torch.Tensor:
    """Band number of every DCT coefficient, by radial frequency and channel: (C, size, size), int64."""
    f = torch.arange(size, dtype=torch.float64)
    radius = torch.hypot(f[:, None], f[None, :]).contiguous()
    radial = torch.bucketize(radius, torch.tensor(BAND_EDGES[1:], dtype=torch.float64), right=True)
    bands = len(BAND_EDGES) - 1
    return radial[None] + bands * torch.arange(CHANNELS)[:, None, None]


def require_images(y: torch.Tensor, size: int) -> None:
    """Raise ValueError unless y is (B, 3, size, size)."""
    if y.ndim != 4 or tuple(y.shape[1:]) != (CHANNELS, size, size):
        raise ValueError(f"y has shape {tuple(y.shape)}; this density is defined on (B, {CHANNELS}, {size}, {size})")


def levels_of(s: Levels, y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The noise level of every image of y (B, ...), (B,), on the device and in the dtype of `like`; ValueError for others."""
    s = torch.as_tensor(s, dtype=like.dtype, device=like.device)
    if s.ndim > 1 or (s.ndim == 1 and len(s) not in (1, len(y))):
        raise ValueError(f"s has shape {tuple(s.shape)}; expected one noise level or one for each of {len(y)} images")
    return s.expand(len(y))


def log_weights_of(weights: torch.Tensor | None, log_weights: torch.Tensor, batch: int) -> torch.Tensor:
    """Logarithms of a mixture's weights, (B or 1, K): those that replace its own (B or 1, K), or its `log_weights` (K,).

    A row of zeros, as from ConditioningZeroOut, asks for nothing in particular. Raises ValueError for another shape.
    """
    if weights is None:
        return log_weights[None]
    if weights.ndim != 2 or weights.shape[1] != len(log_weights) or len(weights) not in (1, batch):
        raise ValueError(f"weights has shape {tuple(weights.shape)}; expected ({batch}, {len(log_weights)})")
    weights = weights.to(log_weights)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, log_weights.exp())
    return weights.log() - weights.sum(1, keepdim=True).log()


@dataclass
class _NoiseLevel:
    """What depends on s alone, per image: B images, K components, J bands, rank r."""

    precision: torch.Tensor  # (B, D)
    band_precision: torch.Tensor  # (B, J)
    m_inv: torch.Tensor  # (B, K, r, r)
    log_det: torch.Tensor  # (B, K)


@dataclass
class _Evaluation:
    c: torch.Tensor  # (B, D)
    level: _NoiseLevel
    a: torch.Tensor  # (B, K, r): M_k^-1 W_k P (c - m_k)
    resp: torch.Tensor  # (B, K): posterior weights of the components
    log_prob: torch.Tensor  # (B,)


class ExactDensity:
    """Exact log p_s and its derivatives for images of `size` x `size` x 3, flattened DCT inside.

    Every method takes y (B, 3, size, size) in VE coordinates, s (B,) or a float, and optional `weights` (B, K)
    that replace the mixture weights (rows need not be normalised; a zero removes a component, a row of zeros leaves the
    mixture as it is). Results are in y's dtype; the arithmetic runs in the dtype of the tables (float64 unless `to`
    changed it).

    Raises ValueError where y is not (B, 3, size, size), or s or weights do not fit it.
    """

    def __init__(
        self, log_weights: torch.Tensor, means: torch.Tensor, factors: torch.Tensor, band_variance: torch.Tensor, size: int
    ):
        """Tables in latent units: log_weights (K,), means (K, 3, N, N), factors (K, r, 3, L, L), band_variance (J,).

        `size` must be at most N. Factors cover the lowest L frequencies; they are cut or zero-padded to `size`.
        """
        full = means.shape[-1]
        if not 8 <= size <= full:
            raise ValueError(f"size is {size}; the density has sizes from 8 to {full}")
        low = min(size, factors.shape[-1])
        # An orthonormal DCT coefficient of an image grows with its size.
        scale = size / full
        index = band_index(size)
        self.size, self.low = size, low
        self.channel_dct, self.pixel_dct = dct_matrix(CHANNELS), dct_matrix(size)
        self.log_weights = log_weights.double()
        self.means = scale * means[..., :size, :size].double().flatten(1)  # (K, D)
        self.factors = scale * factors[..., :low, :low].double().flatten(2)  # (K, r, D_low)
        self.band_variance = scale**2 * band_variance.double()
        self.index = index.flatten()  # (D,)
        self.low_index = index[:, :low, :low].flatten()
        self.low_slots = torch.arange(index.numel()).view(index.shape)[:, :low, :low].flatten()
        self._sum_bands()

    def _sum_bands(self) -> None:
        """Sums over the coefficients of each band, so that nothing of size D depends on both k and s."""
        bands = self.band_variance.numel()
        self.band_count = torch.bincount(self.index, minlength=bands).to(self.means)  # (J,)
        one_hot = torch.nn.functional.one_hot(self.index, bands).to(self.means)  # (D, J)
        self.mean_energy = self.means.square() @ one_hot  # (K, J)
        low_means = self.means[:, self.low_slots]
        self.gram = torch.stack(
            [  # (J, K, r, r): W_k W_k^T of band j
                (w := self.factors[..., self.low_index == j]) @ w.mT for j in range(bands)
            ]
        )
        self.factor_mean = torch.stack(
            [  # (J, K, r): W_k m_k of band j
                (self.factors[..., self.low_index == j] @ low_means[:, self.low_index == j, None])[..., 0] for j in range(bands)
            ]
        )

    @classmethod
    def load(cls, path: str | Path, size: int) -> "ExactDensity":
        """Read the tables from a safetensors file."""
        with safe_open(path, framework="pt") as f:
            return cls(
                f.get_tensor("log_weights"), f.get_tensor("means"), f.get_tensor("factors"), f.get_tensor("band_variance"), size
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return self.means.dtype

    @property
    def components(self) -> int:
        """K."""
        return self.log_weights.numel()

    @property
    def dim(self) -> int:
        """D, the number of elements of one image."""
        return self.index.numel()

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> "ExactDensity":
        """A copy with its tables on `device`, in `dtype`."""
        other = object.__new__(ExactDensity)
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                value = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            setattr(other, name, value)
        return other

    def one_hot(self, component: int) -> torch.Tensor:
        """Weights (1, K) that leave one component: a single Gaussian."""
        if not 0 <= component < self.components:
            raise ValueError(f"component is {component}; the density has components 0 to {self.components - 1}")
        return torch.nn.functional.one_hot(torch.tensor([component]), self.components).to(self.means)

    # --- exact quantities -------------------------------------------------------------------------------------

    def log_prob(self, y: torch.Tensor, s: Levels, weights: torch.Tensor | None = None) -> torch.Tensor:
        """log p_s(y) in nats, (B,)."""
        return self._evaluate(y, s, weights).log_prob.to(y.dtype)

    def bits_per_dim(self, y: torch.Tensor, s: Levels, weights: torch.Tensor | None = None) -> torch.Tensor:
        """-log2 p_s(y) / D, (B,): larger means more detail."""
        return nats_to_bits_per_dim(self.log_prob(y, s, weights), self.dim)

    def score(self, y: torch.Tensor, s: Levels, weights: torch.Tensor | None = None) -> torch.Tensor:
        """grad log p_s(y), shape of y."""
        e = self._evaluate(y, s, weights)
        return self._image(self._mean_gradient(e, e.resp), y)

    def denoised(self, y: torch.Tensor, s: Levels, weights: torch.Tensor | None = None) -> torch.Tensor:
        """E[x0 | y] = y + s^2 score (Tweedie), shape of y."""
        e = self._evaluate(y, s, weights)
        s2 = levels_of(s, y, self.means).square()[:, None]
        return self._image(e.c + s2 * self._mean_gradient(e, e.resp), y)

    def laplacian(self, y: torch.Tensor, s: Levels, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Laplacian of log p_s at y, (B,)."""
        e = self._evaluate(y, s, weights)
        p2 = e.level.band_precision.square()
        gram2 = torch.einsum("bj,jkrq->bkrq", p2, self.gram)
        texture = e.level.band_precision @ self.band_count
        trace = torch.einsum("bkrq,bkqr->bk", e.level.m_inv, gram2) - texture[:, None]
        pp = e.level.precision.square()
        centred = (pp * e.c.square()).sum(1)[:, None] - 2 * (pp * e.c) @ self.means.T + p2 @ self.mean_energy.T
        cross = self._project(pp * e.c) - torch.einsum("bj,jkr->bkr", p2, self.factor_mean)
        gradient_energy = centred - 2 * (cross * e.a).sum(-1) + torch.einsum("bkr,bkrq,bkq->bk", e.a, gram2, e.a)
        score = self._mean_gradient(e, e.resp)
        return ((e.resp * (trace + gradient_energy)).sum(1) - score.square().sum(1)).to(y.dtype)

    def hessian_product(self, y: torch.Tensor, s: Levels, v: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """H v with H the Hessian of log p_s at y; v and the result have the shape of y."""
        e = self._evaluate(y, s, weights)
        vc = self._dct(v)
        p = e.level.precision
        wv = self._project(p * vc)  # (B, K, r)
        within = -p * vc + p * self._expand(e.resp[..., None] * (e.level.m_inv @ wv[..., None])[..., 0])
        slope = -(((p * vc * e.c).sum(1))[:, None] - (p * vc) @ self.means.T - (wv * e.a).sum(-1))  # g_k . v
        between = self._mean_gradient(e, e.resp * slope)
        score = self._mean_gradient(e, e.resp)
        return self._image(within + between - score * (score * vc).sum(1, keepdim=True), v)

    def sample(self, count: int, s: float, generator: torch.Generator, weights: torch.Tensor | None = None) -> torch.Tensor:
        """`count` exact draws from p_s, (count, 3, size, size), in the tables' dtype; `generator` is on the CPU."""
        w = (self.log_weights.exp() if weights is None else weights[0]).cpu()
        k = torch.multinomial(w, count, replacement=True, generator=generator)
        texture = torch.randn(count, self.dim, dtype=torch.float64, generator=generator).to(self.means)
        variation = torch.randn(count, self.factors.shape[1], dtype=torch.float64, generator=generator).to(self.means)
        c = self.means[k] + (self.band_variance[self.index] + s**2).sqrt() * texture
        c[:, self.low_slots] += torch.einsum("brd,br->bd", self.factors[k], variation)
        return self._idct(c)

    # --- inside -----------------------------------------------------------------------------------------------

    def _evaluate(self, y: torch.Tensor, s: Levels, weights: torch.Tensor | None) -> _Evaluation:
        require_images(y, self.size)
        level = self._noise_level(levels_of(s, y, self.means))
        log_w = log_weights_of(weights, self.log_weights, len(y))
        c = self._dct(y)
        pc = level.precision * c
        u = self._project(pc) - torch.einsum("bj,jkr->bkr", level.band_precision, self.factor_mean)
        a = (level.m_inv @ u[..., None])[..., 0]
        distance = (
            (pc * c).sum(1)[:, None] - 2 * pc @ self.means.T + level.band_precision @ self.mean_energy.T - (u * a).sum(-1)
        )
        joint = log_w - 0.5 * (distance + level.log_det + self.dim * math.log(2 * math.pi))
        return _Evaluation(c, level, a, joint.softmax(1), joint.logsumexp(1))

    def _noise_level(self, s: torch.Tensor) -> _NoiseLevel:
        levels, which = s.unique(return_inverse=True)
        variance = self.band_variance + levels.square()[:, None]  # (S, J)
        p = 1 / variance
        m = torch.einsum("sj,jkrq->skrq", p, self.gram)
        m.diagonal(dim1=-2, dim2=-1).add_(1)
        chol = torch.linalg.cholesky(m)
        log_det = (variance.log() @ self.band_count)[:, None] + 2 * chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        m_inv = torch.cholesky_inverse(chol)
        return _NoiseLevel(p[:, self.index][which], p[which], m_inv[which], log_det[which])

    def _project(self, c: torch.Tensor) -> torch.Tensor:
        """W_k c of every component: (B, D) -> (B, K, r)."""
        k, r, _ = self.factors.shape
        return (c[:, self.low_slots] @ self.factors.flatten(0, 1).T).view(-1, k, r)

    def _expand(self, coefficients: torch.Tensor) -> torch.Tensor:
        """sum_k W_k^T coefficients_k: (B, K, r) -> (B, D)."""
        low = coefficients.flatten(1) @ self.factors.flatten(0, 1)
        return low.new_zeros(len(low), self.dim).index_copy(1, self.low_slots, low)

    def _mean_gradient(self, e: _Evaluation, weights: torch.Tensor) -> torch.Tensor:
        """sum_k weights_k grad log N_k, (B, D) in the DCT domain."""
        centred = weights.sum(1, keepdim=True) * e.c - weights @ self.means
        return e.level.precision * (self._expand(weights[..., None] * e.a) - centred)

    def _dct(self, y: torch.Tensor) -> torch.Tensor:
        """(B, 3, size, size) -> (B, D), in the tables' dtype."""
        return _transformed(y.to(self.means), [self.channel_dct, self.pixel_dct, self.pixel_dct]).flatten(1)

    def _idct(self, c: torch.Tensor) -> torch.Tensor:
        """Inverse of `_dct`."""
        matrices = [self.channel_dct.T, self.pixel_dct.T, self.pixel_dct.T]
        return _transformed(c.view(-1, CHANNELS, self.size, self.size), matrices)

    def _image(self, c: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self._idct(c).to(like.dtype)

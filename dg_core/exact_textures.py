"""A density over textures in which a small push at high noise decides the contrast, exact at every noise level.

A mixture over T photographed textures and K contrasts. Each component is the random-phase model of a photograph (one colour
for each frequency, with a little of the others, and all phases equally likely) at one contrast, plus a floor of noise:

    p_s(y) = sum_tk w_tk N(y; m_t, c_k Lambda_t + v I),      v = floor^2 + s^2

The contrasts c_k lie so closely that their typical sets overlap. As with photographs, the log-density then changes by several
times what guidance adds. Lambda_t is diagonal in the Fourier domain except for its colours, so log p, score, Laplacian and
Hessian products are exact, at the cost of a Fourier transform.

symbol      name        meaning
y, s        y, s        VE coordinates, see `schedule`
f           -           one of F frequencies of a real Fourier transform
e_tf, L_tf  colour, -   unit vector of 3 channels and variance along it, of the texture t at f; r = `OTHER_COLOURS`:
                        Lambda_t = L (e e^H + r (I - e e^H))
L_tj        variance    variance of group j: frequencies of nearly equal L share their mean, in J / 2 groups along e, and in as
                        many across it
c_k         contrasts   factor of the variance, log-spaced
Z_tf        z           e_tf^H (Y_f - M_tf), with Y, M the Fourier transforms of y and m_t

Source of the texture model: B. Galerne, Y. Gousseau, J.-M. Morel, "Random Phase Textures: Theory and Synthesis" (2011). The
mixture over contrasts: derived here.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .exact_density import CHANNELS, Levels, levels_of, log_weights_of, require_images
from .units import nats_to_bits_per_dim

CONTRASTS = 0.3, 3.0  # lowest and highest factor of the variance
FLOOR = 0.02  # standard deviation of the noise in every image; textures have about 0.8
OTHER_COLOURS = 0.03  # of the variance of a frequency, in either direction across its colour
_GROUPS = 64  # of each size, 1, 2, 4, ...: frequencies that share a variance


@dataclass
class _Evaluation:
    """Of B images: see the module for the symbols."""

    centred: torch.Tensor  # (B, T, 3, F), complex: Y - M
    z: torch.Tensor  # (B, T, F), complex
    energy: torch.Tensor  # (B, T, J): that of y - m in each group
    total: torch.Tensor  # (B, T): |y - m|^2
    v: torch.Tensor  # (B,)
    shrinkage: torch.Tensor  # (S, T, K, J): c L_tj / (c L_tj + v) at each of S noise levels
    level: torch.Tensor  # (B,): which of them
    resp: torch.Tensor  # (B, T, K): posterior weights
    log_prob: torch.Tensor  # (B,)

    def at_level(self, equation: str, operand: torch.Tensor) -> torch.Tensor:
        """An einsum of `shrinkage` at the image's noise level and an operand: "stkj,b... -> sb..."."""
        return torch.einsum(equation, self.shrinkage, operand)[self.level, torch.arange(len(self.level), device=operand.device)]


class ExactTextures:
    """Exact log p_s and its derivatives for images of `size` x `size` x 3; the methods are those of `ExactDensity`.

    The components of `weights` (B, T * K) are the contrasts of the first texture, then those of the second, and so on.
    """

    def __init__(self, photographs: torch.Tensor, contrasts: tuple[float, float] = CONTRASTS, floor: float = FLOOR):
        """photographs: (T, 3, size, size), each taken as periodic. contrasts: the lowest and the highest c.

        Raises ValueError for photographs of another shape or with an odd size, and contrasts that do not ascend from above 0.
        """
        shape = tuple(photographs.shape)
        if len(shape) != 4 or shape[1] != CHANNELS or shape[2] != shape[3] or shape[2] % 2 or shape[2] < 8:
            raise ValueError(f"photographs have shape {shape}; expected (T, {CHANNELS}, size, size), even sizes from 8 on")
        low, high = contrasts
        if not 0 < low < high:
            raise ValueError(f"contrasts are {contrasts}; they must ascend, and be above 0")
        photographs = photographs.double()
        size = shape[2]
        self.size, self.dim, self.textures, self.floor = size, CHANNELS * size**2, shape[0], floor
        # Closer than the width of ln c that an image tells: sqrt(2 / D) if all of its elements did.
        steps = math.ceil(math.log(high / low) / math.sqrt(2 / self.dim))
        self.contrasts = torch.linspace(math.log(low), math.log(high), steps + 1, dtype=torch.float64).exp()
        self.log_weights = torch.full((shape[0] * len(self.contrasts),), -math.log(shape[0] * len(self.contrasts))).double()
        self.means = photographs.mean((-2, -1))  # (T, 3)
        spectrum = torch.fft.rfft2(photographs - self.means[..., None, None], norm="ortho").flatten(2)  # (T, 3, F)
        variance = spectrum.abs().square().sum(1)
        self.colour = spectrum / variance.sqrt().clamp_min(1e-30)[:, None]
        # A real transform leaves out the conjugates of all columns but the first and the last.
        count = torch.full((size, size // 2 + 1), 2.0, dtype=torch.float64)
        count[:, [0, -1]] = 1
        self.count = count.flatten()  # (F,)
        self.order = variance.argsort(1, descending=True)  # (T, F)
        self.place = self.order.argsort(1)
        self.group_sizes = _group_sizes(variance.shape[1])
        count_in_group = self._grouped(self.count.expand_as(variance))
        along = self._grouped(variance * self.count) / count_in_group
        self.group_count = torch.cat([count_in_group, 2 * count_in_group], 1)  # (T, J)
        self.variance = torch.cat([along, OTHER_COLOURS * along], 1)  # (T, J)

    @property
    def components(self) -> int:
        """Number of components, T * K."""
        return len(self.log_weights)

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return self.means.dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> "ExactTextures":
        """A copy with its tables on `device` in the real dtype `dtype`."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                kind = dtype.to_complex() if value.is_complex() else dtype if value.is_floating_point() else value.dtype
                setattr(other, name, value.to(device=device, dtype=kind))
        return other

    def one_hot(self, component: int) -> torch.Tensor:
        """Weights (1, T * K) that leave one texture, at all contrasts."""
        if not 0 <= component < self.textures:
            raise ValueError(f"component is {component}; the density has textures 0 to {self.textures - 1}")
        chosen = torch.nn.functional.one_hot(torch.tensor([component]), self.textures).to(self.means)
        return chosen.repeat_interleave(len(self.contrasts), 1)

    # --- exact quantities -------------------------------------------------------------------------------------

    def log_prob(self, y: torch.Tensor, s: Levels, weights: torch.Tensor | None = None) -> torch.Tensor:
        """log p_s(y) in nats, (B,)."""
        return self._evaluate(y, s, weights).log_prob.to(y.dtype)

    def bits_per_dim(self, y: torch.Tensor, s: Levels, weights: torch.Tensor | None = None) -> torch.Tensor:
        """-log2 p_s(y) / D, (B,): larger means more detail."""
        return nats_to_bits_per_dim(self.log_prob(y, s, weights), self.dim)

    def score(self, y: torch.Tensor, s: Levels, weights: torch.Tensor | None = None) -> torch.Tensor:
        """grad log p_s(y), shape of y."""
        return self._image(self._score(self._evaluate(y, s, weights)), y)

    def denoised(self, y: torch.Tensor, s: Levels, weights: torch.Tensor | None = None) -> torch.Tensor:
        """E[x0 | y] = y + s^2 score (Tweedie), shape of y."""
        e = self._evaluate(y, s, weights)
        s2 = (e.v - self.floor**2).view(-1, 1, 1, 1)
        return (y + s2 * self._inverse(self._score(e))).to(y.dtype)

    def laplacian(self, y: torch.Tensor, s: Levels, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Laplacian of log p_s at y, (B,)."""
        e = self._evaluate(y, s, weights)
        v = e.v[:, None, None]
        # Of each component: v tr H = -D + sum_j n_j shrinkage, v^2 |S|^2 = |y - m|^2 - sum_j E_j (1 - (1 - shrinkage)^2)
        trace = (e.at_level("stkj,btj->sbtk", self.group_count.expand_as(e.energy)) - self.dim) / v
        inside = 1 - (1 - e.shrinkage).square()
        gradient = (e.total[..., None] - torch.einsum("stkj,btj->sbtk", inside, e.energy)[e.level, self._rows(y)]) / v**2
        score = self._inverse(self._score(e)).flatten(1)
        return ((e.resp * (trace + gradient)).sum((1, 2)) - score.square().sum(1)).to(y.dtype)

    def hessian_product(self, y: torch.Tensor, s: Levels, v: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """H v with H the Hessian of log p_s at y; v and the result have the shape of y."""
        e = self._evaluate(y, s, weights)
        noise = e.v[:, None, None]
        w = self._transform(v)[:, None]  # (B, 1, 3, F)
        zw = (self.colour.conj() * w).sum(2)
        both = (e.centred.conj() * w).real.sum(2)
        cross = self._energies((e.z.conj() * zw).real, both)
        slope = -((self.count * both).sum(2, keepdim=True) - e.at_level("stkj,btj->sbtk", cross)) / noise  # <S_tk, v>
        within = self._mean(e, e.resp, w.expand_as(e.centred), zw)
        between = self._mean(e, e.resp * slope, e.centred, e.z)
        score = self._inverse(self._score(e))
        product = self._inverse(within + between) - score * (score * v.to(score)).sum((1, 2, 3), keepdim=True)
        return product.to(v.dtype)

    def sample(self, count: int, s: float, generator: torch.Generator, weights: torch.Tensor | None = None) -> torch.Tensor:
        """`count` exact draws from p_s, (count, 3, size, size), in the tables' dtype; `generator` is on the CPU."""
        w = (self.log_weights.exp() if weights is None else weights[0]).cpu()
        component = torch.multinomial(w, count, replacement=True, generator=generator).to(self.means.device)
        t, k = component // len(self.contrasts), component % len(self.contrasts)
        normal = lambda *shape: torch.randn(count, *shape, dtype=torch.float64, generator=generator).to(self.means)
        white = self._transform(normal(CHANNELS, self.size, self.size))
        along = (self.colour[t].conj() * white).sum(1, keepdim=True) * self.colour[t]
        deviation = (self.contrasts[k, None] * self._spread(self.variance.chunk(2, -1)[0])[t]).sqrt()
        texture = self._inverse(deviation[:, None] * (along + OTHER_COLOURS**0.5 * (white - along)))
        noise = (self.floor**2 + s**2) ** 0.5 * normal(CHANNELS, self.size, self.size)
        return self.means[t, :, None, None] + texture + noise

    # --- inside -----------------------------------------------------------------------------------------------

    def _evaluate(self, y: torch.Tensor, s: Levels, weights: torch.Tensor | None) -> _Evaluation:
        require_images(y, self.size)
        log_w = log_weights_of(weights, self.log_weights, len(y)).view(-1, self.textures, len(self.contrasts))
        levels, level = levels_of(s, y, self.means).unique(return_inverse=True)
        v = self.floor**2 + levels.square()  # (S,)
        signal = self.contrasts[:, None] * self.variance[:, None]  # (T, K, J)
        total_variance = signal + v[:, None, None, None]
        shrinkage = signal / total_variance
        log_det = (self.group_count[:, None] * total_variance.log()).sum(-1)  # (S, T, K)

        centred = self._transform(y)[:, None].repeat(1, self.textures, 1, 1)
        centred[..., 0] -= self.size * self.means
        z = (self.colour.conj() * centred).sum(2)
        whole = centred.abs().square().sum(2)
        energy, total = self._energies(z.abs().square(), whole), (self.count * whole).sum(2)
        rows = self._rows(y)
        explained = torch.einsum("stkj,btj->sbtk", shrinkage, energy)[level, rows]
        v = v[level]
        distance = (total[..., None] - explained) / v[:, None, None]
        joint = log_w - 0.5 * (distance + log_det[level] + self.dim * math.log(2 * math.pi))
        resp = joint.flatten(1).softmax(1).view_as(joint)
        return _Evaluation(centred, z, energy, total, v, shrinkage, level, resp, joint.flatten(1).logsumexp(1))

    def _score(self, e: _Evaluation) -> torch.Tensor:
        """Of the mixture, in the Fourier domain, (B, 3, F)."""
        return self._mean(e, e.resp, e.centred, e.z)

    def _mean(self, e: _Evaluation, weights: torch.Tensor, vector: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """sum_tk weights_tk times -(c_k Lambda_t + v)^-1 vector_t, (B, 3, F); weights (B, T, K), vector (B, T, 3, F) and its
        projection z on the colours, (B, T, F)."""
        along, across = (self._spread(g) for g in e.at_level("stkj,btk->sbtj", weights).chunk(2, -1))
        whole = (weights.sum(2, keepdim=True) - across)[:, :, None] * vector
        return ((self.colour * ((along - across) * z)[:, :, None] - whole) / e.v.view(-1, 1, 1, 1)).sum(1)

    def _energies(self, along: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Sums over the groups, (..., T, J), of the part along the colours and of the rest of the whole, (..., T, F) each."""
        return torch.cat([self._grouped(self.count * part) for part in (along, whole - along)], -1)

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the groups of frequencies: (..., T, F) -> (..., T, J / 2)."""
        values = values.gather(-1, self.order.expand_as(values))
        parts = values.split([groups * size for groups, size in self.group_sizes], -1)
        return torch.cat([p.unflatten(-1, (-1, size)).sum(-1) for p, (_, size) in zip(parts, self.group_sizes)], -1)

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """Each frequency gets the value of its group: (..., T, J / 2) -> (..., T, F)."""
        parts = values.split([groups for groups, _ in self.group_sizes], -1)
        ordered = torch.cat([p.repeat_interleave(size, -1) for p, (_, size) in zip(parts, self.group_sizes)], -1)
        return ordered.gather(-1, self.place.expand_as(ordered))

    def _transform(self, y: torch.Tensor) -> torch.Tensor:
        """(B, 3, size, size) -> (B, 3, F), complex, in the tables' dtype."""
        return torch.fft.rfft2(y.to(self.dtype), norm="ortho").flatten(2)

    def _inverse(self, spectrum: torch.Tensor) -> torch.Tensor:
        """Inverse of `_transform`."""
        return torch.fft.irfft2(spectrum.unflatten(2, (self.size, -1)), s=(self.size, self.size), norm="ortho")

    def _image(self, spectrum: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self._inverse(spectrum).to(like.dtype)

    @staticmethod
    def _rows(y: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(y), device=y.device)


def _group_sizes(frequencies: int) -> Sequence[tuple[int, int]]:
    """[(number of groups, frequencies in each)]: `_GROUPS` of one frequency, then of two, of four, ..."""
    sizes, left, size = [], frequencies, 1
    while left:
        groups = max(1, min(_GROUPS, left // size))
        if groups * size > left:  # what remains is less than a group
            size = left
        sizes.append((groups, size))
        left -= groups * size
        size *= 2
    return sizes

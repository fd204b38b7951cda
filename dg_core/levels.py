"""Where to place a given number of model evaluations among the noise levels.

symbol     name         unit
s          s            noise level in VE coordinates, see `schedule`
R, S       -            0.8 and 1.5 sqrt(D): noise levels between which images of D numbers become one

Placement on this clock: derived here, from the errors of log-densities on mixtures of images.
"""

import math
from collections.abc import Sequence

import numpy as np

_MERGING = 0.8, 1.5  # R and S over sqrt(D)


def clock(s: float, dim: int) -> float:
    """The clock ln s + ln(1 + s/R) - 2 ln(1 + s/S), finite at s = infinity.

    It is ln s far below R; between R and S, where few dimensions decide between images and densities have narrow features, it
    runs up to twice as fast; above S it slows to a halt.
    """
    merging, merged = _merging(dim)
    if math.isinf(s):
        return math.log(merged**2 / merging)
    return math.log(s) + math.log1p(s / merging) - 2 * math.log1p(s / merged)


def clock_rate(s: float, dim: int) -> float:
    """d clock / d ln s at the finite noise level s."""
    merging, merged = _merging(dim)
    return 1 + s / (s + merging) - 2 * s / (s + merged)


def noise_levels(s_low: float, s_high: float, count: int, dim: int) -> list[float]:
    """`count` noise levels from s_low up to s_high (may be infinite), equally spaced on `clock`: a list of floats.

    Raises ValueError unless 0 < s_low < s_high and count >= 2.
    """
    if count < 2:
        raise ValueError(f"steps is {count}; a log-density takes at least 2 model evaluations")
    if not 0 < s_low < s_high:
        raise ValueError(f"the noise levels are {s_low:.4g} to {s_high:.4g}; they must ascend, and be above 0")
    merging, merged = _merging(dim)
    ticks = np.exp(np.linspace(clock(s_low, dim), clock(s_high, dim), count)[1:-1])
    # exp(clock) = s (1 + s/R) / (1 + s/S)^2, solved for s
    square, linear = 1 / merging - ticks / merged**2, 1 - 2 * ticks / merged
    return [s_low, *(2 * ticks / (linear + np.sqrt(linear**2 + 4 * square * ticks))).tolist(), s_high]


def longest_step(levels: Sequence[float], dim: int) -> tuple[float, float, float]:
    """(length on `clock`, s at its start, s at its end) of the longest step between descending noise levels above 0."""
    steps = [(clock(start, dim) - clock(stop, dim), start, stop) for start, stop in zip(levels, levels[1:]) if stop > 0]
    return max(steps, default=(0.0, 0.0, 0.0))


def snapped(levels: Sequence[float], table: Sequence[float]) -> list[float]:
    """Each level's nearest, in log-SNR, of the noise levels in `table`, every one once: a list of floats in the same order."""
    nearest = np.abs(np.log(table) - np.log(levels)[:, None]).argmin(1)
    return [float(table[i]) for i in dict.fromkeys(nearest.tolist())]


def _merging(dim: int) -> tuple[float, float]:
    return _MERGING[0] * dim**0.5, _MERGING[1] * dim**0.5

"""Units of detail: quantiles, z-values, nats and bits per dimension.

Bits per dimension are -log2 p(y) / D, the field's convention: larger means more detail.
"""

import math
from typing import Any, TypeVar

import scipy.special
import torch

Amount = TypeVar("Amount", float, torch.Tensor)


def require_number(name: str, value: Any, low: float, high: float) -> float:
    """Return `value` as a float; raise ValueError unless it is a finite number in [low, high]."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, str):  # of the numbers that it may hold none was meant as one
        number = math.nan
    exact = value if isinstance(value, int) else number  # a float of a large seed is rounded, perhaps above its limit
    if not (math.isfinite(number) and low <= exact <= high):
        raise ValueError(f"{name} is {value!r}; it must be a number from {low} to {high}")
    return number


def require_whole(name: str, value: Any, low: int, high: int) -> int:
    """Return `value` as an int; raise ValueError unless it is a whole number in [low, high]."""
    number = math.nan if isinstance(value, str) else require_number(name, value, low, high)
    if not number.is_integer():
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
    return int(value)  # a float rounds large ones


def require_quantile(quantile: float) -> float:
    """Return `quantile` as a float; raise ValueError unless 0 < quantile < 1."""
    number = require_number("quantile", quantile, 0, 1)
    if number in (0, 1):
        raise ValueError(f"quantile is {quantile!r}; it must lie strictly between 0 and 1")
    return number


def quantile_to_z(quantile: float) -> float:
    """Standard normal quantile Phi^-1(q); exactly 0 at q = 0.5. Raises ValueError unless 0 < quantile < 1."""
    return float(scipy.special.ndtri(require_quantile(quantile)))


def nats_to_bits_per_dim(log_density: Amount, dim: float) -> Amount:
    """-log_density / (D ln 2): nats of one image to bits per dimension."""
    return -log_density / (dim * math.log(2))


def error_bits_per_dim(error: Amount, dim: float) -> Amount:
    """A standard error in nats of one image, in bits per dimension."""
    return error / (dim * math.log(2))


def bits_per_dim_to_nats(bits: Amount, dim: float) -> Amount:
    """Inverse of `nats_to_bits_per_dim`."""
    return -bits * dim * math.log(2)

"""Norms and dimensions of single images, in float32 or better, over all elements or over those of a mask."""

import torch

from .schedule import per_image


def compute_dtype(dtype):
    """float32 for anything narrower: a squared norm overflows float16, and bfloat16 rounds eta to 1."""
    return torch.promote_types(dtype, torch.float32)


def region_of(mask):
    """1 where a soft mask is positive, else 0: the elements that count in norms and D."""
    return (mask > 0).to(compute_dtype(mask.dtype))


def dimension(x, mask=None):
    """D: the number of elements of one image of x (B, ...).

    An int without `mask`; with one (broadcastable to x, values in [0, 1]) the sum of its weights, (B,).
    """
    if mask is None:
        return x.shape[1:].numel()
    return mask.expand_as(x).flatten(1).sum(1, dtype=compute_dtype(mask.dtype))


def squared_norm(x, mask=None):
    """||x||^2 of every image, (B,), on x's device; elements count with the weight that `mask` gives them."""
    dtype = compute_dtype(x.dtype)
    if mask is None:
        return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=dtype).square()
    return (x.to(dtype).square() * mask).flatten(1).sum(1)


def inner(a, b, weight=None):
    """<a, b> of every image, (B, 1, ...), in their dtype; elements count with their `weight`."""
    product = a * b if weight is None else a * b * weight
    return per_image(product.flatten(1).sum(1), a.ndim)


def scale_images(x, factor):
    """Multiply image i of x by factor[i], keeping x's dtype."""
    return (x.to(factor.dtype) * per_image(factor, x.ndim)).to(x.dtype)

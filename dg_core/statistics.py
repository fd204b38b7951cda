"""Norms and dimensions of single images, in float32 or better, over all elements or over those of a mask.

Sums run over one image at a time: a sum over several rows at once may add in another order, and an image must not depend on the
batch that it is in.
"""

import torch


def per_image(value: torch.Tensor, ndim: int) -> torch.Tensor:
    """Reshape a tensor (B,) to (B, 1, ...) with `ndim` dimensions; a 0-d tensor is returned as it is."""
    return value.reshape(-1, *[1] * (ndim - 1)) if value.ndim else value


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for anything narrower: a squared norm overflows float16, and bfloat16 rounds eta to 1."""
    return torch.promote_types(dtype, torch.float32)


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def region_of(mask: torch.Tensor) -> torch.Tensor:
    """1 where a soft mask is positive, else 0: the elements that count in norms and D. Shape of mask."""
    return (mask > 0).to(compute_dtype(mask.dtype))


def dimension(x: torch.Tensor, weights: torch.Tensor | None = None) -> list[float]:
    """D of every image of x (B, ...): its number of elements, or the sum of their weights (broadcastable to x)."""
    if weights is None:
        return [x[0].numel()] * len(x)
    return image_sums(weights.expand_as(x), sum_dtype(weights.device)).tolist()


def image_sums(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The sum over each image of x (B, ...), (B,)."""
    return torch.stack([image.sum(dtype=dtype) for image in x])


def squared_norm(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """||x||^2 of every image of x (B, ...), (B,), on x's device; elements count with their weights, broadcastable to x."""
    dtype = compute_dtype(x.dtype)
    if weights is None:
        return torch.stack([torch.linalg.vector_norm(image, dtype=dtype) for image in x]).square()
    return image_sums(x.to(dtype).square() * weights)


def inner(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """<a, b> of every image of a and b (B, ...), (B, 1, ...), in their dtype; elements count with their weights."""
    return per_image(image_sums(a * b if weights is None else a * b * weights), a.ndim)


def scale_images(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply image i of x (B, ...) by factor[i], (B,), keeping x's dtype."""
    return (x.to(factor.dtype) * per_image(factor, x.ndim)).to(x.dtype)

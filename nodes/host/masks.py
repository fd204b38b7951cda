"""Masks of the host in the shape of a latent, and what they weigh there."""

import comfy.sampler_helpers
import torch

from ...dg_core.statistics import region_of


def mask_for(mask: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """A mask (N, height, width) in the shape of a latent (B, channels, ...), resized as the host resizes noise masks.

    A video takes N masks as frames; a latent of one dimension takes the mean over the height. Raises ValueError for N masks
    of another number of images.
    """
    if latent.ndim <= 4 and len(mask) not in (1, len(latent)):
        raise ValueError(
            f"mask has {len(mask)} masks and the latent has {len(latent)} images; connect one mask for all, or {len(latent)}"
        )
    mask = mask.float()
    if latent.ndim == 3:
        mask = mask.mean(1, keepdim=True)
    elif latent.ndim == 4:
        mask = mask.unsqueeze(1)
    return comfy.sampler_helpers.prepare_mask(mask, latent.shape, latent.device)


def weights_of(mask: torch.Tensor | None, latent: torch.Tensor, denoise_mask: torch.Tensor | None) -> torch.Tensor | None:
    """How much each element of a latent counts, and how strongly it is changed: None, or broadcastable to the latent.

    mask: None, or the input (N, height, width), which acts within the region that an inpainting run replaces (denoise_mask:
    None, or from 0 to 1, broadcastable).
    """
    region = None if denoise_mask is None else region_of(denoise_mask)
    if mask is None:
        return region
    weights = mask_for(mask, latent)
    return weights if region is None else weights * region


def amount_of(mask: torch.Tensor | None, latent: torch.Tensor, denoise_mask: torch.Tensor | None) -> torch.Tensor | None:
    """How strongly each element of a latent is changed, where the host blends nothing in: `weights_of` times denoise_mask."""
    if mask is None:
        return denoise_mask
    return mask_for(mask, latent) if denoise_mask is None else mask_for(mask, latent) * denoise_mask

"""Latents that are images: the latent format and the VAE of the built-in models."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import comfy.latent_formats
import comfy.sd
import torch

from ...dg_core.exact_density import CHANNELS
from ..host.inputs import Number

BATCH_SIZE = Number("batch_size", "Number of images in the latent, each with its own noise.", default=4, low=1, high=64)


class PixelLatent(comfy.latent_formats.LatentFormat):
    """Images in [-1, 1], centred and scaled."""

    latent_channels = CHANNELS

    def __init__(self, shift: Sequence[float] = (0.0,) * CHANNELS, scale: float = 1.0):
        self.scale_factor = scale
        self._shift = torch.tensor(shift).view(1, -1, 1, 1)
        self.latent_rgb_factors = (torch.eye(CHANNELS) / scale).tolist()
        self.latent_rgb_factors_bias = list(shift)

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) from -1 to 1 -> the model's latent, (B, 3, H, W). Raises ValueError for other channels."""
        if latent.ndim != 4 or latent.shape[1] != CHANNELS:
            shape = " x ".join(map(str, latent.shape[1:]))
            raise ValueError(
                f"the latent has {shape} elements per image; this built-in model takes {CHANNELS} channels: use the "
                "latent output of its loader, or encode with its vae"
            )
        return (latent - self._shift.to(latent)) * self.scale_factor

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        """The inverse of `process_in`."""
        return latent / self.scale_factor + self._shift.to(latent)


def empty_latent(batch_size: int, size: int) -> dict[str, torch.Tensor]:
    """A LATENT of zeros. Raises ValueError, naming the input, for a wrong number of images."""
    return {"samples": torch.zeros(BATCH_SIZE.check(batch_size), CHANNELS, size, size)}


def pixel_vae() -> Any:
    """The host's VAE for latents that are pixels; `PixelVAE` where the host has none yet."""
    if find_spec("comfy.pixel_space_convert") is None:
        return PixelVAE()
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


class PixelVAE:
    """What VAEDecode and VAEEncode need of a VAE whose latents are pixels."""

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, height, width) from -1 to 1 -> images (B, height, width, 3) from 0 to 1."""
        return ((samples + 1) / 2).clamp(0, 1).movedim(1, -1)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The inverse of `decode`."""
        return images.movedim(-1, 1)[:, :3] * 2 - 1

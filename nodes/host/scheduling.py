"""The pack's own scheduler: noise levels evenly spaced on the clock of `dg_core.levels`."""

from typing import Any

import torch
from comfy_api.latest import io

from ...dg_core.levels import noise_levels
from .inputs import Number, Socket, samples_of
from .noise_path import path_of

LOWEST = 0.03  # s below which images hold nothing to see: SDXL and SD 1.5 end here, flow models far below
_SIDE = 128  # of a latent, where none is connected: that of an image of 1024 x 1024

MODEL = Socket("model", "The model that will be sampled; sets the range of noise levels.", io.Model)
STEPS = Number(
    "steps",
    "Number of steps N, one model call each with most samplers. 20 are enough, 32 for strong guidance.",
    default=20,
    low=2,
    high=1000,
)
DENOISE = Number(
    "denoise",
    "How much of the sampling is done, as in BasicScheduler: 1 from pure noise, less to change an image.",
    default=1.0,
    neutral=1.0,
    low=0.01,
    high=1.0,
)
LATENT = Socket(
    "latent_image",
    "The latent that will be sampled. The detail of larger images is decided at higher noise.",
    io.Latent,
    unlinked=f"a latent of {_SIDE} x {_SIDE}",
)


def density_sigmas(model: Any, steps: int, denoise: float, latent: Any = None) -> torch.Tensor:
    """SIGMAS (steps + 1,), from the model's highest noise level down to 0; with denoise below 1 the last of a longer row.

    Raises ValueError, naming the input, for a wrong one, and for a model without a Gaussian noise path.
    """
    sampling = MODEL.check(model).get_model_object("model_sampling")
    path, steps = path_of(sampling), STEPS.check(steps)
    if latent is None:
        dim = model.get_model_object("latent_format").latent_channels * _SIDE**2
    else:
        dim = samples_of(LATENT.name, LATENT.check(latent))[:1].numel()
    high, low = path.s(float(sampling.sigma_max)), path.s(float(sampling.sigma_min))
    levels = noise_levels(max(low, min(LOWEST, high / 2)), high, int(steps / DENOISE.check(denoise)), dim)
    return torch.tensor([*(path.sigma(s) for s in reversed(levels)), 0.0])[-(steps + 1) :]

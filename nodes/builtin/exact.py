"""The exact densities as models of the host: `BaseModel`, latent format and VAE, in three parameterisations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models_base
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from safetensors import safe_open

from ...dg_core.exact_density import CHANNELS, ExactDensity
from ...dg_core.exact_textures import ExactTextures
from ...dg_core.statistics import sum_dtype
from ..host.inputs import Choice, Number, Socket, require, samples_of, sigmas_of
from ..host.model_access import path_of
from .pixels import BATCH_SIZE, PixelLatent, empty_latent, pixel_vae

MODELS = Path(__file__).resolve().parent.parent.parent / "models"
WEIGHTS = MODELS / "exact_density.safetensors"
TEXTURES = ("dunes", "canyon", "ice", "granite", "reef", "grass")
TEXTURE_SCALE = 4.0  # latent units per unit of an image in [-1, 1]
TEXTURE_STD = 0.2  # of an image in [-1, 1], at the contrast 1

Density = ExactDensity | ExactTextures


@dataclass(frozen=True)
class NoiseRange:
    """Noise levels that surround all scales of a density, in latent units; and shift and number of levels of its flow, whose
    table would else end far below the finest texture, in steps without an effect."""

    sigma_min: float
    sigma_max: float
    flow_shift: float
    flow_timesteps: int


# Texture has 0.5, images are apart by 100 at 32 x 32.
EMOJI_RANGE = NoiseRange(0.1, 160.0, 3.0, 96)
LARGEST_EMOJI = 64


def _emoji(size: int) -> tuple[ExactDensity, PixelLatent, NoiseRange]:
    if size > LARGEST_EMOJI:
        raise ValueError(f"size is {size}; the kind emoji has sizes 32, 48 and 64: choose one of them, or the kind textures")
    with safe_open(WEIGHTS, framework="pt") as f:
        latent_format = PixelLatent(f.get_tensor("shift").tolist(), float(f.get_tensor("scale")))
    return ExactDensity.load(WEIGHTS, size), latent_format, EMOJI_RANGE


def _textures(size: int) -> tuple[ExactTextures, PixelLatent, NoiseRange]:
    images = torch.stack([torch.from_numpy(np.array(Image.open(MODELS / "textures" / f"{name}.png"))) for name in TEXTURES])
    images = images.double().movedim(-1, 1) / 127.5 - 1
    if not 8 <= size <= images.shape[-1] or images.shape[-1] % size:
        raise ValueError(f"size is {size}; textures have sizes that divide {images.shape[-1]}: choose 32, 64, 128 or 256")
    images = torch.nn.functional.avg_pool2d(images, images.shape[-1] // size)
    mean = images.mean((2, 3), keepdim=True)
    images = mean + (images - mean) * TEXTURE_STD / (images - mean).square().mean((1, 2, 3), keepdim=True).sqrt()
    # The strongest wave of a texture grows with the size, as the distance between textures does.
    shift = 3 * size / 64
    levels = NoiseRange(0.04, 2.5 * size, shift, round(24 * shift))
    return ExactTextures(TEXTURE_SCALE * images), PixelLatent(scale=TEXTURE_SCALE), levels


EMOJI, TEXTURE = "emoji", "textures"
KINDS: dict[str, Callable[[int], tuple[Density, PixelLatent, NoiseRange]]] = {EMOJI: _emoji, TEXTURE: _textures}


class _EPS(comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EPS):
    pass


class _V(comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.V_PREDICTION):
    pass


class _Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    pass


def _continuous(cls: type, levels: NoiseRange) -> Any:
    sampling = cls()
    sampling.set_parameters(levels.sigma_min, levels.sigma_max, sigma_data=1.0)
    return sampling


def _flow(levels: NoiseRange) -> Any:
    sampling = _Flow()
    sampling.set_parameters(shift=levels.flow_shift, timesteps=levels.flow_timesteps)
    return sampling


# prediction -> (type of the host's model, its sampling)
PREDICTIONS = {
    "eps": (comfy.model_base.ModelType.EPS, lambda levels: _continuous(_EPS, levels)),
    "v": (comfy.model_base.ModelType.V_PREDICTION_EDM, lambda levels: _continuous(_V, levels)),
    "flow": (comfy.model_base.ModelType.FLOW, _flow),
}

PREDICTION = Choice(
    "prediction",
    "Which kind of model it pretends to be: eps (like SD1.5, SDXL), v (like SD2) or flow (like SD3, Flux). The "
    "density is the same.",
    options=tuple(PREDICTIONS),
    default="flow",
    neutral="any",
)
SIZE = Choice(
    "size",
    "Width and height of the images, in pixels: 32, 48 or 64 for emoji; 32, 64, 128 or 256 for textures.",
    options=("64", "48", "32", "128", "256"),
    default="64",
)
COMPONENT = Number(
    "component",
    "What the conditioning asks for, like a prompt: the number of one of 128 emojis, or of one of the textures "
    f"{', '.join(f'{name} ({i})' for i, name in enumerate(TEXTURES))}. -1 asks for all.",
    default=-1,
    neutral=-1,
    low=-1,
    high=127,
)
KIND = Choice(
    "kind",
    "emoji: 128 emojis; detail is grain, and changes by the number asked for. textures: photographed textures; detail is "
    "contrast, and changes are amplified as by trained models.",
    options=tuple(KINDS),
    default=EMOJI,
    optional=True,
)
INPUTS = PREDICTION, SIZE, COMPONENT, BATCH_SIZE, KIND
READ_INPUTS = (
    Socket("model", "The model of Load Exact Density Model, patched or not.", io.Model),
    Socket("latent", "What a sampler returned for the sigmas below.", io.Latent),
    Socket(
        "sigmas",
        "The noise levels sigma that made the latent. The density is read at the last one, which must be "
        "above 0: cut the last step off with SplitSigmas.",
        io.Sigmas,
    ),
)


class ExactDensityNetwork(torch.nn.Module):
    """Stands where a trained network would: turns (input, timestep) into the output that the sampling expects."""

    dtype = torch.float32

    def __init__(self, density: Density, prediction: str):
        super().__init__()
        self.prediction = prediction
        # Not buffers, which would take the dtype of the network and move with it: a copy for each device, in float64.
        self._tables = {torch.device("cpu"): density}

    def density_on(self, device: torch.device) -> Density:
        """The density's tables on `device`; in float64 wherever the device has it."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device, sum_dtype(device))
        return self._tables[device]

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        """The network's output (B, 3, size, size) for the host's input and timesteps (B,); context: (B, 1, K) weights."""
        density = self.density_on(x.device)
        wide = density.dtype
        t = timesteps.to(wide)
        sigma = t / 1000 if self.prediction == "flow" else (4 * t).exp()
        shape = (-1, 1, 1, 1)
        # At alpha = 0 the data is invisible: the limit, to rounding.
        alpha = (1 - sigma).clamp(min=1e-8) if self.prediction == "flow" else torch.ones_like(sigma)
        sigma_x = sigma.view(shape)
        x = x.to(wide)
        if self.prediction != "flow":
            x = x * (sigma_x**2 + 1).sqrt()
        weights = None if context is None else context.to(wide).sum(1)
        if weights is not None and weights.shape[-1] != density.components:
            raise ValueError(
                f"conditioning has {weights.shape[-1]} components and the model has {density.components}: connect both from "
                "the same Load Exact Density Model"
            )
        denoised = density.denoised(x / alpha.view(shape), sigma / alpha, weights)
        if self.prediction == "v":
            out = (x / (sigma_x**2 + 1) - denoised) * (sigma_x**2 + 1).sqrt() / sigma_x
        else:
            out = (x - denoised) / sigma_x
        return out.to(self.dtype)


class ExactDensityModel(comfy.model_base.BaseModel):
    """A model of the host whose density is known: `density` is it."""

    def __init__(self, density: Density, prediction: str, latent_format: PixelLatent, levels: NoiseRange):
        config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
        config.latent_format = latent_format
        config.memory_usage_factor = 0.1
        model_type, sampling = PREDICTIONS[prediction]
        super().__init__(config, model_type)
        self.model_sampling = sampling(levels)
        self.diffusion_model = ExactDensityNetwork(density, prediction)
        self.density = density

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """As the host's; raises ValueError for a latent of another shape, or another sampling patched in."""
        expected = (CHANNELS, self.density.size, self.density.size)
        shape = tuple(kwargs["noise"].shape[1:])
        _require_shape(shape, expected)
        own = type(self.model_sampling) in (_EPS, _V) or isinstance(self.model_sampling, comfy.model_sampling.CONST)
        if not own:
            raise ValueError(
                f"model has its sampling patched to {type(self.model_sampling).__name__}; the exact-density model needs its "
                "own: remove the patch, and choose eps, v or flow in the loader"
            )
        return super().extra_conds(**kwargs)


def _require_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(
            f"the latent has {' x '.join(map(str, shape))} elements per image; this exact-density model takes "
            f"{' x '.join(map(str, expected))}: use the latent output of its loader, or load the model at that size"
        )


def load(prediction: str, size: int, kind: str = EMOJI) -> tuple[comfy.model_patcher.ModelPatcher, Any]:
    """(ModelPatcher, VAE) of an exact density, one of `KINDS`. Raises ValueError for a size that it does not have."""
    density, latent_format, levels = KINDS[kind](size)
    model = ExactDensityModel(density, prediction, latent_format, levels)
    patcher = comfy.model_patcher.ModelPatcher(
        model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )
    return patcher, pixel_vae()


def loaded(
    prediction: str, size: str, component: int, batch_size: int, kind: str
) -> tuple[Any, Any, list[Any], dict[str, torch.Tensor]]:
    """(MODEL, VAE, CONDITIONING, empty LATENT) of the host: what Load Exact Density Model gives."""
    model, vae = load(PREDICTION.check(prediction), int(SIZE.check(size)), KIND.check(kind))
    component, density = COMPONENT.check(component), model.model.density
    weights = density.log_weights.exp()[None] if component < 0 else density.one_hot(component)
    return model, vae, [[weights.float()[:, None], {}]], empty_latent(batch_size, density.size)


def readout(model: Any, latent: dict[str, Any], sigmas: torch.Tensor) -> tuple[list[float], str]:
    """(bits per dimension of every image, the same as text): what Exact Log-Density gives."""
    bits = read(model, samples_of("latent", latent), sigmas_of(sigmas))
    return bits, "\n".join(f"image {i}: {b:.4f} bits per dimension" for i, b in enumerate(bits))


def read(model: Any, samples: torch.Tensor, sigmas: Sequence[float], weights: torch.Tensor | None = None) -> list[float]:
    """Exact bits per dimension of a latent that a sampler returned, at the last of `sigmas`: a list of floats.

    The host divides what a flow model returns by alpha, so `samples` are VE coordinates for every prediction type.
    """
    base = require("model", model, "model", "Load Exact Density Model").model
    if not isinstance(base, ExactDensityModel):
        raise ValueError(
            f"model is a {type(base).__name__}; its density is not known exactly: connect Load Exact Density Model"
        )
    sigma = float(sigmas[-1]) if len(sigmas) else 0.0
    if not sigma > 0:
        raise ValueError(
            f"sigmas end at {sigma}; the log-density is read at a noise level above 0: "
            "cut the last step off with SplitSigmas and sample with high_sigmas"
        )
    s = path_of(model.get_model_object("model_sampling")).s(sigma)
    if not math.isfinite(s):
        raise ValueError(f"sigmas end at {sigma}, where a flow model has pure noise and no log-density: sample further down")
    _require_shape(tuple(samples.shape[1:]), (CHANNELS, base.density.size, base.density.size))
    return base.density.bits_per_dim(base.process_latent_in(samples.cpu().double()), s, weights).tolist()

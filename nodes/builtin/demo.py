"""The demo model: a small UNet of the host, trained on photographs of ground, without a download."""

import json
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch

from ..host.inputs import Choice
from .packed_weights import unpack
from .pixels import BATCH_SIZE, CHANNELS, PixelLatent, empty_latent, pixel_vae

WEIGHTS = Path(__file__).resolve().parent.parent.parent / "models" / "demo_model.safetensors"
SIZE = 64  # pixels
CLASSES = ["paving", "snow", "rock", "undergrowth", "grass", "sand", "earth"]  # in the order of the weights' file
ANY = "any"
CLASS_NAME = Choice(
    "class_name",
    "The kind of ground that the output positive asks for. 'any': no particular one.",
    options=(*CLASSES, ANY),
    default="rock",
    neutral=ANY,
)
INPUTS = CLASS_NAME, BATCH_SIZE
SCALE = 2.0  # gives the images nearly unit variance
CONTEXT_DIM = 128
# Arguments of the host's `UNetModel`, the architecture of Stable Diffusion.
UNETS: dict[str, dict[str, Any]] = {
    "small": {"model_channels": 32, "channel_mult": [1, 2, 4, 8], "num_res_blocks": [1, 1, 1, 1]},
    "large": {"model_channels": 64, "channel_mult": [1, 2, 3, 4], "num_res_blocks": [2, 2, 2, 2]},
}
ATTENTION = [0, 0, 1, 1]  # transformer blocks by level: at 16 x 16 and 8 x 8


class _Config(comfy.supported_models_base.BASE):
    unet_extra_config: dict[str, Any] = {}
    # Up to sigma 139. Stable Diffusion's end at 14.6, where the mean colour of an image still shows: noise has none, and what
    # is sampled from it comes out grey.
    sampling_settings = {"linear_end": 0.024}
    memory_usage_factor = 0.5


def network(
    size: str, dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None
) -> comfy.model_base.BaseModel:
    """A `BaseModel` of the host with an untrained UNet.

    size: a key of `UNETS`. compute_dtype: where the weights, of `dtype`, are cast for computing.
    """
    unet = UNETS[size]
    blocks = unet["num_res_blocks"]
    config = _Config(
        {
            **unet,
            "image_size": SIZE,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_heads": -1,
            "num_head_channels": 32,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "context_dim": CONTEXT_DIM,
            "transformer_depth_middle": 1,
            "transformer_depth": [d for d, n in zip(ATTENTION, blocks) for _ in range(n)],
            "transformer_depth_output": [d for d, n in zip(ATTENTION, blocks) for _ in range(n + 1)],
        }
    )
    config.latent_format = PixelLatent(scale=SCALE)
    config.set_inference_dtype(dtype, compute_dtype)
    return comfy.model_base.BaseModel(config, comfy.model_base.ModelType.V_PREDICTION)


def load(
    dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None
) -> tuple[comfy.model_patcher.ModelPatcher, Any, list[str], torch.Tensor]:
    """(ModelPatcher, VAE, class names, context tokens (classes + 1, 1, CONTEXT_DIM); the last asks for no class).

    dtype, compute_dtype: see `network`. Raises FileNotFoundError where the pack lacks the weights.
    """
    if not WEIGHTS.is_file():
        raise FileNotFoundError(
            f"{WEIGHTS} is missing: the pack's folder is not complete, get it again, or train the model "
            "with training/train_demo_model.py"
        )
    stored, metadata = comfy.utils.load_torch_file(str(WEIGHTS), return_metadata=True)
    weights = unpack(stored)
    context = weights.pop("context")
    model = network(metadata["size"], dtype, compute_dtype)
    model.diffusion_model.load_state_dict(weights)
    patcher = comfy.model_patcher.ModelPatcher(
        model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )
    return patcher, pixel_vae(), json.loads(metadata["classes"]), context[:, None]


def loaded(class_name: str, batch_size: int) -> tuple[Any, Any, list[Any], list[Any], dict[str, torch.Tensor]]:
    """(MODEL, VAE, positive, negative, empty LATENT) of the host: what Load Demo Model gives."""
    chosen = CLASS_NAME.options.index(CLASS_NAME.check(class_name))
    latent = empty_latent(batch_size, SIZE)
    model, vae, _, context = load()
    positive, negative = ([[context[i : i + 1], {}]] for i in (chosen, len(CLASSES)))
    return model, vae, positive, negative, latent

"""Small real networks of the host with random weights, loaded in inference mode as the host loads them."""

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams

from . import host_runs as h
from .tiny_models import newer_arguments

CONTEXT = 16
_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "context_dim": CONTEXT,
    "num_heads": 4,
    "num_head_channels": -1,
    "adm_in_channels": None,
    "legacy": False,
}


def unet(dtype=torch.float32, model_type="EPS", weights=None):
    """A `ModelPatcher` of a Stable Diffusion 1.5 with 32 channels that computes in `dtype`, with random weights.

    weights: a dtype that they are rounded to before, as those of a checkpoint in that dtype.
    """
    with torch.inference_mode():
        config = comfy.supported_models.SD15({**_UNET, "dtype": dtype})
        config.set_inference_dtype(dtype, None)
        model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType[model_type])
        generator = torch.Generator().manual_seed(0)
        for p in model.diffusion_model.parameters():
            scale = 1.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1
            drawn = scale * torch.randn(p.shape, generator=generator) + (p.ndim == 1) * 0.5
            p.copy_(drawn.to(weights or dtype))
        return h.kept(comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")))


def unet_conditioning(seed=0, rows=1):
    return [[torch.randn(rows, 7, CONTEXT, generator=torch.Generator().manual_seed(seed)), {}]]


_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 8,
    "context_in_dim": CONTEXT,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    **newer_arguments(FluxParams),
}


def dit(dtype=torch.float32):
    """A `ModelPatcher` of a Flux, a flow model: two blocks of width 64, random weights that compute in `dtype`."""
    with torch.inference_mode():
        config = comfy.supported_models.FluxSchnell({**_FLUX, "dtype": dtype})
        config.set_inference_dtype(dtype, None)
        model = comfy.model_base.Flux(config)
        generator = torch.Generator().manual_seed(0)
        for p in model.diffusion_model.parameters():
            scale = 1 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1
            p.copy_(scale * torch.randn(p.shape, generator=generator) + (p.ndim == 1) * 0.5)
        return h.kept(comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")))


def dit_conditioning():
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(1, 7, CONTEXT, generator=generator), {"pooled_output": torch.randn(1, 8, generator=generator)}]]

"""The host's own guidance methods, guiders, caches and conditionings, as they enter a run of a tiny model."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
import safetensors.torch
import torch

from . import host_runs as h
from . import tiny_models

CFG = 3.0
LORA = "density_guidance_test.safetensors"


def as_it_is(thing):
    return thing


def _same_conditioning(positive, negative):
    return positive, negative


def _cfg_guider(model, positive, negative):
    return h.core_node("CFGGuider", model=model, positive=positive, negative=negative, cfg=CFG)


@dataclass(frozen=True)
class Method:
    """One method of the host, as it enters a run of a tiny model."""

    family: str = "sd15"
    patch: Callable[[Any], Any] = as_it_is  # of the model
    conditioning: Callable = _same_conditioning  # (positive, negative) -> the same
    guider: Callable = _cfg_guider  # (model, positive, negative) -> GUIDER
    sampler: str = "euler"
    mask: bool = False  # inpainting
    denoise: float = 1.0
    batch: int = 2  # 1 for methods of the host that cannot do more
    own_state: bool = False  # reuses predictions, so that other states need other calls


def _node(name, **inputs):
    return lambda model: h.core_node(name, model=model, **inputs)


def _dual(style):
    return lambda model, positive, negative: h.core_node(
        "DualCFGGuider",
        model=model,
        cond1=positive,
        cond2=_third("sd15"),
        negative=negative,
        cfg_conds=CFG,
        cfg_cond2_negative=2.0,
        style=style,
    )


def _third(name):
    return tiny_models.conditioning(name, 3)


def _perp_neg(model, positive, negative):
    return h.core_node(
        "PerpNegGuider",
        model=model,
        positive=positive,
        negative=negative,
        empty_conditioning=_third("sd15"),
        cfg=CFG,
        neg_scale=0.7,
    )


def _halves():
    """Two soft masks, (1, height, width), that add up to one."""
    left = torch.linspace(1, 0, 16).expand(1, 16, 16).contiguous()
    return left, 1 - left


def _two_regions(positive, negative):
    parts = [
        h.core_node("ConditioningSetMask", conditioning=c, mask=m, strength=1.0, set_cond_area="default")
        for c, m in zip((positive, _third("sd15")), _halves())
    ]
    return h.core_node("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1]), negative


def _area(positive, negative):
    part = h.core_node("ConditioningSetArea", conditioning=_third("sd15"), width=64, height=64, x=32, y=0, strength=1.0)
    return h.core_node("ConditioningCombine", conditioning_1=positive, conditioning_2=part), negative


def _timesteps(positive, negative):
    early, late = (
        h.core_node("ConditioningSetTimestepRange", conditioning=c, start=a, end=b)
        for c, a, b in ((positive, 0.0, 0.5), (_third("sd15"), 0.5, 1.0))
    )
    return h.core_node("ConditioningCombine", conditioning_1=early, conditioning_2=late), negative


def _control(positive, negative):
    image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(4))
    return h.core_node(
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        strength=1.0,
        image=image,
        control_net=_control_net(),
        start_percent=0.0,
        end_percent=0.6,
    )


@lru_cache
def _control_net():
    return tiny_models.control_net("sd15")


@lru_cache
def _lora():
    """The name of a LoRA file for sd15, in a folder where the host finds it."""
    folder = Path(tempfile.mkdtemp())
    safetensors.torch.save_file(tiny_models.lora("sd15"), folder / LORA)
    folder_paths.add_model_folder_path("loras", str(folder))
    return LORA


def _hooks(positive, negative):
    hooks = h.core_node("CreateHookLoraModelOnly", lora_name=_lora(), strength_model=1.0)
    return h.core_node(
        "ConditioningSetProperties", cond_NEW=positive, strength=1.0, set_cond_area="default", hooks=hooks
    ), negative


def _merge(model):
    return h.core_node("ModelMergeSimple", model1=model, model2=tiny_models.build("sd15", seed=3), ratio=0.5)


METHODS = {
    "CFG": Method(),
    "CFG++ (euler_cfg_pp)": Method(sampler="euler_cfg_pp"),
    "Dual CFG, regular": Method(guider=_dual("regular")),
    "Dual CFG, nested": Method(guider=_dual("nested")),
    "Perp-Neg": Method(guider=_perp_neg),
    "RescaleCFG": Method(patch=_node("RescaleCFG", multiplier=0.7)),
    "CFG-Zero*": Method("sd3", patch=_node("CFGZeroStar")),
    "CFGNorm": Method("qwen_image", patch=_node("CFGNorm", strength=1.0)),
    "RenormCFG": Method("lumina2", patch=_node("RenormCFG", cfg_trunc=100.0, renorm_cfg=1.0), batch=1),
    "APG": Method(patch=_node("APG", eta=0.5, norm_threshold=5.0, momentum=0.3)),
    "TCFG": Method(patch=_node("TCFG")),
    "FreSca": Method(patch=_node("FreSca", scale_low=1.0, scale_high=1.25, freq_cutoff=4)),
    "Mahiro": Method(patch=_node("Mahiro")),
    "PAG": Method(patch=_node("PerturbedAttentionGuidance", scale=2.0)),
    "SAG": Method(patch=_node("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0)),
    "Skip-layer guidance (SD3)": Method(
        "sd3", patch=_node("SkipLayerGuidanceSD3", layers="0", scale=2.0, start_percent=0.0, end_percent=0.7)
    ),
    "Skip-layer guidance (DiT)": Method(
        "chroma",
        patch=_node(
            "SkipLayerGuidanceDiT",
            double_layers="0",
            single_layers="0",
            scale=2.0,
            start_percent=0.0,
            end_percent=0.7,
            rescaling_scale=0.0,
        ),
    ),
    "Skip-layer guidance (simple)": Method(
        "chroma",
        patch=_node("SkipLayerGuidanceDiTSimple", double_layers="0", single_layers="0", start_percent=0.0, end_percent=0.7),
    ),
    "Epsilon Scaling": Method(patch=_node("Epsilon Scaling", scaling_factor=1.005)),
    "Temporal Score Rescaling": Method("sd3", patch=_node("TemporalScoreRescaling", tsr_k=0.95, tsr_sigma=1.0), batch=1),
    "Linear CFG of video frames": Method("svd", patch=_node("VideoLinearCFGGuidance", min_cfg=1.0)),
    "Model sampling: SD3 shift": Method("sd3", patch=_node("ModelSamplingSD3", shift=6.0)),
    "Model sampling: v, zsnr": Method("sd2", patch=_node("ModelSamplingDiscrete", sampling="v_prediction", zsnr=True)),
    "Prompt from a step to a step": Method(conditioning=_timesteps),
    "Regional prompts: masks": Method(conditioning=_two_regions),
    "Regional prompts: areas": Method(conditioning=_area),
    "ControlNet": Method(conditioning=_control),
    "LoRA": Method(patch=lambda model: h.core_node("LoraLoaderModelOnly", model=model, lora_name=_lora(), strength_model=1.0)),
    "LoRA by hooks": Method(conditioning=_hooks),
    "Model merging": Method(patch=_merge),
    "FreeU": Method(patch=_node("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2)),
    "HyperTile": Method(patch=_node("HyperTile", tile_size=64, swap_size=2, max_depth=0, scale_depth=False)),
    "Inpainting": Method(mask=True),
    "Differential Diffusion": Method(patch=_node("DifferentialDiffusion", strength=1.0), mask=True),
    "Context windows": Method(
        "wan21",
        patch=_node(
            "WanContextWindowsManual",
            context_length=5,
            context_overlap=1,
            context_schedule="standard_static",
            context_stride=1,
            closed_loop=False,
            fuse_method="pyramid",
        ),
        batch=1,
    ),
    **{
        name: Method(
            "wan21", own_state=True, patch=_node(name, reuse_threshold=3.0, start_percent=0.1, end_percent=0.95, verbose=False)
        )
        for name in ("EasyCache", "LazyCache")
    },
    "torch.compile": Method("stable_audio", patch=_node("TorchCompileModel", backend="inductor")),
    "Image to image": Method(denoise=0.5),
}
COMPILED = "torch.compile"  # needs a C++ compiler

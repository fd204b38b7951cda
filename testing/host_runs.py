"""Runs in the real host, in this process: models, guiders, noise and samplers as a graph would make them.

Everything goes through the host's own node classes, in inference mode as the host runs them.
"""

import asyncio
import contextlib
import inspect
import math
import sys
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models_base
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler as custom

from ..nodes import DensityGuidanceModel, DensityGuidanceSampler, LoadExactDensityModel, StochasticDetailVariation
from ..nodes.builtin import exact
from ..nodes.host.wrappers import outermost

PREDICTIONS = ["eps", "v", "flow"]
KINDS = ["eps", "flow"]  # v is the same function as eps: tests/test_exact_model.py
SIZE = 16  # of the exact density: a quarter of the time of the smallest that the loader offers
SEED = 7

# The host collects garbage, at length, whenever a model that it holds as loaded is gone.
_recent = deque(maxlen=64)


@contextlib.contextmanager
def without_plots():
    """In it nodes give white images for plots, as where matplotlib is not installed: drawing takes most of a second."""
    import matplotlib.figure

    sys.modules["matplotlib.figure"] = None
    try:
        yield
    finally:
        sys.modules["matplotlib.figure"] = matplotlib.figure


def kept(model):
    """The model, alive for a while."""
    _recent.append(model)
    return model


def forget_models():
    """Unload what the host holds as loaded: call it before a long series of runs of another model."""
    comfy.model_management.unload_all_models()


def outputs(node, *args, **kwargs):
    """What a node returns, as a tuple."""
    with torch.inference_mode():
        return tuple(node.execute(*args, **kwargs).result)


@lru_cache
def _node_classes():
    import nodes

    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    return nodes.NODE_CLASS_MAPPINGS


def _missing(node, inputs):
    """The defaults of a node's inputs that a newer host asks for, as the page sends them."""
    asked = inspect.signature(node.execute).parameters.values()
    needed = {p.name for p in asked if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD} - set(inputs)
    return {i.id: i.default for i in node.define_schema().inputs if i.id in needed}


def core_node(name, **inputs):
    """The outputs of one of the host's own nodes, by its id; a single output as itself."""
    node = _node_classes()[name]
    with torch.inference_mode():
        if hasattr(node, "define_schema"):
            result = node.execute(**_missing(node, inputs), **inputs)
            result = tuple(getattr(result, "result", result))
        else:
            result = getattr(node(), node.FUNCTION)(**inputs)
    return result[0] if len(result) == 1 else result


@lru_cache
def _loaded(prediction, size):
    """What the loader gives, at any size."""
    _, _, *rest = outputs(LoadExactDensityModel, prediction, "32", -1, 2)
    return *exact.load(prediction, size), *rest


def exact_model(prediction, size=SIZE):
    """A fresh clone of the exact-density model."""
    return kept(_loaded(prediction, size)[0].clone())


TEXTURE_SIZE = 32


@lru_cache
def _loaded_textures(prediction):
    return outputs(LoadExactDensityModel, prediction, str(TEXTURE_SIZE), -1, 2, "textures")


def texture_model(prediction):
    """A fresh clone of the exact model of textures, which amplifies as images do."""
    return kept(_loaded_textures(prediction)[0].clone())


def texture_conditioning(prediction="flow", component=-1):
    """The conditioning that asks for one texture, or for all."""
    if component < 0:
        return _loaded_textures(prediction)[2]
    return outputs(LoadExactDensityModel, prediction, str(TEXTURE_SIZE), component, 2, "textures")[2]


def exact_vae():
    return _loaded("flow", SIZE)[1]


def conditioning(prediction="flow", component=-1):
    """The conditioning that asks for one component, or for all."""
    if component < 0:
        return _loaded(prediction, SIZE)[2]
    return outputs(LoadExactDensityModel, prediction, "32", component, 2)[2]


def empty_latent(batch=2, size=SIZE):
    return {"samples": torch.zeros(batch, 3, size, size)}


def schedule(model, steps, scheduler="simple", denoise=1.0):
    return outputs(custom.BasicScheduler, model, scheduler, steps, denoise)[0]


def core_sampler(name):
    return outputs(custom.KSamplerSelect, name)[0]


def guided_sampler(quantile=0.5, detail_shift=0.0, start=0.0, end=1.0, sampler=None, **lists):
    """DensityGuidanceSampler; `sampler`: a SAMPLER, a core sampler's name, or None for the pack's own."""
    if isinstance(sampler, str):
        sampler = core_sampler(sampler)
    return outputs(DensityGuidanceSampler, quantile, detail_shift, start, end, sampler, **lists)[0]


def guided_model(model, quantile=0.5, detail_shift=0.0, start=0.0, end=1.0, **lists):
    return kept(outputs(DensityGuidanceModel, model, quantile, detail_shift, start, end, **lists)[0])


def varied(
    vary="fine details",
    strength=0.5,
    correction="expected",
    quantile=0.5,
    detail_shift=0.0,
    seed=1,
    probes=1,
    window=(0.0, 1.0),
    **lists,
):
    """StochasticDetailVariation."""
    return outputs(
        StochasticDetailVariation, quantile, detail_shift, vary, strength, *window, seed, correction, probes, **lists
    )[0]


def random_noise(seed=SEED):
    return outputs(custom.RandomNoise, seed)[0]


def sample(model, sampler, sigmas, latent=None, seed=SEED, noise=None, positive=None, negative=None, cfg=1.0):
    """(output, denoised_output) latents of SamplerCustomAdvanced; `sampler` as a SAMPLER or a core sampler's name."""
    if isinstance(sampler, str):
        sampler = core_sampler(sampler)
    positive = conditioning() if positive is None else positive
    if negative is None:
        guider = outputs(custom.BasicGuider, model, positive)[0]
    else:
        guider = outputs(custom.CFGGuider, model, positive, negative, cfg)[0]
    latent = empty_latent(size=model.model.density.size) if latent is None else latent
    noise = random_noise(seed) if noise is None else noise
    return outputs(custom.SamplerCustomAdvanced, noise, guider, sampler, sigmas, latent)


def sampled(*args, **kwargs):
    """The samples of `sample`'s first output."""
    return sample(*args, **kwargs)[0]["samples"]


def ksampler(model, sampler_name, steps=6, scheduler="simple", latent=None, denoise=1.0, positive=None):
    """The samples of the host's KSampler node, at CFG 1."""
    import nodes

    latent = empty_latent(size=model.model.density.size) if latent is None else latent
    positive = conditioning() if positive is None else positive
    with torch.inference_mode():
        return nodes.KSampler().sample(
            model, SEED, steps, 1.0, sampler_name, scheduler, positive, conditioning(), latent, denoise
        )[0]["samples"]


@dataclass
class Recorder:
    """What the host asked of a model, in order."""

    calls: int = 0  # of the network
    x: list = field(default_factory=list)  # (B, ...) of every prediction
    sigma: list = field(default_factory=list)
    denoised: list = field(default_factory=list)  # combined, after every function and wrapper of the model
    final: list = field(default_factory=list)  # what the sampler gets
    options: list = field(default_factory=list)  # the model options of the guider


def recording(model):
    """(clone of the model, its `Recorder`)."""
    model, seen = kept(model.clone()), Recorder()

    def apply_model(executor, *args, **kwargs):
        seen.calls += 1
        return executor(*args, **kwargs)

    def combined(executor, *args, **kwargs):
        result = executor(*args, **kwargs)
        seen.denoised.append(result.clone())
        return result

    def run(executor, *args, **kwargs):
        guider = executor.class_obj
        predict = guider.outer_predict_noise

        def final(x, sigma, *rest, **named):
            seen.x.append(x.clone())
            seen.sigma.append(sigma.clone())
            seen.options.append(guider.model_options)
            result = predict(x, sigma, *rest, **named)
            seen.final.append(result.clone())
            return result

        guider.model_options = outermost(guider.model_options, WrappersMP.PREDICT_NOISE, combined)
        guider.outer_predict_noise = final
        try:
            return executor(*args, **kwargs)
        finally:
            guider.outer_predict_noise = predict

    model.add_wrapper(WrappersMP.APPLY_MODEL, apply_model)
    model.add_wrapper(WrappersMP.OUTER_SAMPLE, run)
    return model, seen


class _Network(torch.nn.Module):
    dtype = torch.float32

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, timesteps, **_):
        return self.function(x, timesteps)


def free_model(model_type="FLOW", function=lambda x, t: x):
    """A `ModelPatcher` around a real `BaseModel` of the host whose network is a function of (x, timestep)."""
    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.latent_format = comfy.latent_formats.LatentFormat()
    config.memory_usage_factor = 0.01
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType[model_type])
    model.diffusion_model = _Network(function)
    return kept(comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")))


def free_run(model, sampler, sigmas, noise, cfg=1.0):
    """`guider.sample` of the host, as its nodes call it, for a model without conditioning; noise: a tensor."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[None, {}]], [[None, {}]])
    guider.set_cfg(cfg)
    callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, None, callback, True, SEED)


# --- networks that are one line --------------------------------------------------------------------------------------


def half(x, t):
    """Output of a flow network whose denoised prediction is x / 2; t is 1000 sigma."""
    return x / (0.002 * t.view(-1, *[1] * (x.ndim - 1)))


def towards_a_pattern(x, t):
    """Output of a flow network whose prediction is nonlinear in x; t is 1000 sigma."""
    sigma = t.view(-1, 1, 1, 1) / 1000
    return (x - torch.tanh(1.5 * x + 0.3)) / sigma.clamp(min=1e-3)


def noise_of_a_pattern(x, t):
    """Output of an eps network: bounded, nonlinear in x."""
    return torch.tanh(x + 0.2) + 0.3 * x


# --- masks -----------------------------------------------------------------------------------------------------------


def soft_disc(size, x=0.5, y=0.5, radius=0.35):
    """(1, size, size): 1 inside, soft edge, 0 outside."""
    grid = torch.linspace(0, 1, size)
    distance = torch.hypot(grid[None, :] - x, grid[:, None] - y)
    return ((radius - distance) * 8 + 0.5).clamp(0, 1)[None]


def resized(mask, shape):
    """A mask (N, H, W) on an image latent (B, C, height, width): bilinear, repeated over channels and images."""
    small = torch.nn.functional.interpolate(mask[:, None], size=shape[-2:], mode="bilinear")
    return small.repeat(math.ceil(shape[0] / len(small)), 1, 1, 1)[: shape[0]].expand(shape)


def two_masks():
    """A noise mask (2, 1, SIZE, SIZE) with another region in each image."""
    mask = torch.zeros(2, 1, SIZE, SIZE)
    mask[0, :, SIZE // 8 : SIZE // 2, SIZE // 4 : SIZE - 1] = 1
    mask[1, :, SIZE // 2 :, :] = 1
    return mask


# --- errors ----------------------------------------------------------------------------------------------------------


def fails(words, call, *args, **kwargs):
    """`call` raises a ValueError that says every one of `words`."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{error!s} does not say {missing}"
    else:
        raise AssertionError(f"no ValueError that says {words}")

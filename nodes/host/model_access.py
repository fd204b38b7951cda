"""Any work with a guider's model, done inside the guider's own sampling call.

There the host has loaded the model, encoded the conditioning and armed patches, hooks and offloading, so that every
model call means what it means while sampling.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.ldm.modules import attention
from torch.autograd import forward_ad
from tqdm.auto import tqdm

from ...dg_core import divergence
from ...dg_core.schedule import Coordinates, coordinates_of
from ...dg_core.statistics import compute_dtype
from .steering import without_guidance
from .inputs import require


@dataclass(frozen=True)
class GuiderModel:
    """What `run_in_guider` hands to the function that it runs.

    x: the latent in the model's own space, (B, ...), on its device, in float32 or wider. noise: likewise, after every
    patch of it; zeros where the caller gave none.
    """

    x: torch.Tensor
    noise: torch.Tensor
    coordinates: Coordinates
    model_sampling: object  # of the host, with its patches
    dtype: torch.dtype  # in which the network computes
    predict: object  # (x, sigma) -> denoised, both (n B, ...); sigma a float
    expect: object  # (calls): tell how many there are to be in all, where that is known only now


def run_in_guider(guider, samples, function, calls, sigmas, seed=0, noise=None):
    """function(GuiderModel) as it returns, with the model of a GUIDER of the host; `samples`: a LATENT's tensor.

    The prediction is what samplers get: after CFG and every patch of it, except this pack's density guidance, which would
    not be the model's own density. x may come in several copies of the latent's batch, one after the other: the network
    never sees more than one at once, so memory stays what sampling the latent takes, and the conditioning of each image
    goes with it. calls: how many of them to expect, for progress. sigmas: floats, descending, the noise levels that will
    be visited, for patches that look at the schedule. noise: of samples' shape, for work that begins with noise; the latent
    may then be empty.

    Shows progress and previews; a request to interrupt ends it at the next call. Raises ValueError, before any call,
    for what is not a guider and for latents that it cannot take.
    """
    require("guider", guider, "sample", "a GUIDER, for instance of CFGGuider or BasicGuider")
    patcher = require("guider", guider, "model_patcher", "a GUIDER, for instance of CFGGuider or BasicGuider").model_patcher
    check_latent(patcher, samples, empty_allowed=noise is not None)
    coordinates_of(patcher.get_model_object("model_sampling"))
    sampler = _Work(function, calls, sigmas)
    # Without a step between two noise levels above zero no guidance of this pack is armed.
    schedule = torch.tensor([sigmas[0], 0.0])
    guider.sample(
        torch.zeros_like(samples) if noise is None else noise, samples, sampler, schedule,
        callback=latent_preview.prepare_callback(patcher, calls), disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
    return sampler.result


def check_latent(patcher, samples, empty_allowed=False):
    """Raise ValueError unless `samples` are finite, of the model's channels and dimensions, and hold images (or zeros,
    where those are allowed)."""
    if getattr(samples, "is_nested", False):
        raise ValueError("the latent packs several parts (video and audio) into one; its density is not defined: "
                         "take it apart and connect one part")
    if samples.numel() == 0 or not (empty_allowed or samples.any()):
        raise ValueError(f"the latent of shape {tuple(samples.shape)} is empty; connect one that holds images, from "
                         "VAEEncode or a sampler")
    if not samples.isfinite().all():
        raise ValueError("the latent has elements that are NaN or infinite; its density is not defined")
    latent_format = patcher.get_model_object("latent_format")
    if samples.shape[1] != latent_format.latent_channels:
        raise ValueError(f"the latent has {samples.shape[1]} channels and the model takes {latent_format.latent_channels}: "
                         "encode the image with the VAE of this model")
    wanted = latent_format.latent_dimensions + 2
    if samples.ndim != wanted:
        raise ValueError(f"the latent has shape {tuple(samples.shape)}; the model takes latents of {wanted} dimensions")


class _Work(comfy.samplers.Sampler):
    """Stands where the host expects a sampler, and runs `function` instead; its `result` is there afterwards."""

    def __init__(self, function, calls, sigmas):
        self._function, self._calls, self._sigmas = function, calls, sigmas
        self.result = None

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        # Derivatives do not exist in inference mode, in which the host runs nodes.
        with torch.inference_mode(False), torch.no_grad():
            x, noise = (v.to(compute_dtype(v.dtype), copy=True) for v in (latent_image, noise))
            with tqdm(total=self._calls, disable=disable_pbar) as bar:
                def expect(calls):
                    self._calls = bar.total = calls

                predict = Predict(guider, extra_args, len(x), self._shown(callback, bar), self._sigmas)
                self.result = self._function(GuiderModel(
                    x, noise, coordinates_of(guider.inner_model.model_sampling), guider.inner_model.model_sampling,
                    network_dtype(guider.inner_model), predict, expect))
        return x

    def _shown(self, callback, bar):
        def show(x, denoised):
            step = min(bar.n, self._calls - 1)
            bar.update(bar.n < self._calls)
            if callback is not None:
                callback(step, denoised, x, self._calls)
        return show


# How many times the size of the queries a matrix of attention scores may have; its derivative takes six of them.
_SCORES = 4

CACHE = "easycache"  # where the host's EasyCache and LazyCache are in a model's options

# ModelPatcher -> {kind of run: (method, reason)}. A patch more makes another ModelPatcher.
_methods = WeakKeyDictionary()


def known_method(guider):
    """What `derivative_method` found for this guider's model; None before."""
    return _methods.get(guider.model_patcher, {}).get(_kind(guider))


def _kind(guider):
    """What of a run besides its model decides how derivatives can be taken: the guider, and what conditionings carry with
    them, for instance a ControlNet. Another prompt does not."""
    carried = {(key, type(value)) for conds in getattr(guider, "original_conds", {}).values() for cond in conds
               for key, value in cond.items() if not key.startswith("uuid")}
    return type(guider), frozenset(carried)


def derivative_method(guider, predict, x, v, sigma, dtype):
    """`divergence.method_of` at a state x with the noise sigma, along v; asked once for each model, at `divergence.TRIAL_CALLS`."""
    if known_method(guider) is None:
        _methods.setdefault(guider.model_patcher, {})[_kind(guider)] = divergence.method_of(
            lambda x: predict(x, sigma), x, v, dtype, sigma)
    return known_method(guider)


def network_dtype(model):
    """The dtype in which a `BaseModel` of the host computes."""
    return model.manual_cast_dtype or model.get_dtype()


class Predict:
    """(x, sigma) -> denoised in batches of at most `batch` images, whose conditioning the host keeps in that order.

    The prediction is that of the model: this pack's density guidance of the run around it is left out. show(x, denoised):
    after every call. sigmas: floats, the noise levels that patches are to see; None: those of the run.
    """

    def __init__(self, guider, extra_args, batch, show=lambda x, denoised: None, sigmas=None):
        """Raises ValueError for a model whose patch returns old predictions in the place of new ones."""
        cache = extra_args["model_options"].get("transformer_options", {}).get(CACHE)
        if cache is not None:
            raise ValueError(f"the model carries {type(cache).__name__.removesuffix('Holder')}, which returns earlier "
                             "predictions for new ones; what is computed here needs every prediction: connect the model "
                             "without it")
        self._guider, self._batch, self._show = guider, batch, show
        self._seed = extra_args.get("seed")
        self._options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        transformer = self._options.setdefault("transformer_options", {})
        if sigmas is not None:
            transformer["sample_sigmas"] = torch.tensor(
                sigmas, dtype=torch.float32, device=guider.model_patcher.load_device)
        # Fused attention has no forward-mode derivative, nor has the host's sliced one where memory is short, and plain
        # attention takes memory without end.
        self._dual_options = {**self._options, "transformer_options": {
            "optimized_attention_override": _sliced_attention, **transformer}}

    def __call__(self, x, sigma):
        return torch.cat([self._call(part, sigma) for part in x.split(self._batch)])

    def _call(self, x, sigma):
        comfy.model_management.throw_exception_if_processing_interrupted()
        primal, tangent = forward_ad.unpack_dual(x)
        armed = self._guider.model_options
        self._guider.model_options = without_guidance(armed)
        try:
            denoised = self._guider(
                x, torch.full((len(x),), sigma, dtype=torch.float32, device=x.device),
                model_options=self._options if tangent is None else self._dual_options, seed=self._seed)
        finally:
            self._guider.model_options = armed
        self._show(primal, forward_ad.unpack_dual(denoised).primal)
        return denoised


def _sliced_attention(_, query, key, value, heads, mask=None, *args, **kwargs):
    """The host's attention for some queries at a time, (B, N, heads * d) or (B, heads, N, d): see `_SCORES`."""
    tokens = max(1, _SCORES * query.numel() // (len(query) * heads * key.shape[-2]))
    queries = query.split(tokens, -2)
    by_query = mask is not None and mask.shape[-2] == query.shape[-2]
    masks = mask.split(tokens, -2) if by_query else [mask] * len(queries)
    return torch.cat([attention.attention_pytorch(part, key, value, heads, m, *args, **kwargs)
                      for part, m in zip(queries, masks)], -2)

"""Any work with a guider's model, done inside the guider's own sampling call.

There the host has loaded the model, encoded the conditioning and armed patches, hooks and offloading, so that every
model call means what it means while sampling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.ldm.modules import attention
from torch.autograd import forward_ad
from tqdm.auto import tqdm

from ...dg_core import divergence
from ...dg_core.flow import Denoiser
from ...dg_core.log_density import ProbedModel
from ...dg_core.schedule import Level, NoisePath, Schedule
from ...dg_core.statistics import compute_dtype
from .inputs import parts_refusal, require
from .noise_path import path_of
from .wrappers import without_guidance


def training_table(sampling: Any) -> list[float] | None:
    """The noise levels, floats, to which a model sampling of the host rounds every other; None where it takes any."""
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) or isinstance(
        sampling, comfy.model_sampling.ModelSamplingContinuousEDM
    ):
        return None
    return sampling.sigmas.tolist()


def require_one_part(guider: Any) -> None:
    """Raise ValueError where the latent of a run is several, packed."""
    if any("latent_shapes" in cond.get("model_conds", {}) for conds in guider.conds.values() for cond in conds):
        raise parts_refusal("the latent", "connect a single image or video latent, or use neutral settings")


@dataclass(frozen=True)
class GuiderModel:
    """What `run_in_guider` hands to the function that it runs.

    x: the latent in the model's own space, (B, ...), on its device, in float32 or wider. noise: likewise, after every
    patch of it; zeros where the caller gave none.
    """

    x: torch.Tensor
    noise: torch.Tensor
    path: NoisePath
    model_sampling: Any  # of the host, with its patches
    predict: Denoiser  # for (n B, ...)
    expect: Callable[[int], None]  # (calls): tell how many there are to be in all, where that is known only now


def run_in_guider(
    guider: Any,
    samples: torch.Tensor,
    function: Callable[[GuiderModel], Any],
    calls: int,
    sigmas: Sequence[float],
    seed: int = 0,
    noise: torch.Tensor | None = None,
) -> Any:
    """function(GuiderModel) as it returns, with the model of a GUIDER of the host; `samples`: a LATENT's tensor.

    The prediction is what samplers get: after CFG and every patch of it, except this pack's density guidance, which would
    not be the model's own density. x may come in several copies of the latent's batch, one after the other: the network
    never sees more than one at once, so memory stays what sampling the latent takes, and the conditioning of each image
    goes with it. calls: how many of them to expect, for progress. sigmas: floats, descending, the noise levels that will
    be visited, for patches that read the schedule. noise: of samples' shape, for work that begins with noise; the latent
    may then be empty.

    Shows progress and previews; a request to interrupt ends it at the next call. Raises ValueError, before any call,
    for what is not a guider and for latents that it cannot take.
    """
    require("guider", guider, "sample", "a GUIDER, for instance of CFGGuider or BasicGuider")
    patcher = require("guider", guider, "model_patcher", "a GUIDER, for instance of CFGGuider or BasicGuider").model_patcher
    check_latent(patcher, samples, empty_allowed=noise is not None)
    path_of(patcher.get_model_object("model_sampling"))
    sampler = _Work(function, calls)
    guider.sample(
        torch.zeros_like(samples) if noise is None else noise,
        samples,
        sampler,
        torch.tensor(sigmas, dtype=torch.float32),
        callback=latent_preview.prepare_callback(patcher, calls),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return sampler.result


def check_latent(patcher: Any, samples: torch.Tensor, empty_allowed: bool = False) -> None:
    """Raise ValueError unless `samples` are finite, of the model's channels and dimensions, and hold images (or zeros,
    where those are allowed)."""
    if getattr(samples, "is_nested", False):
        raise parts_refusal("the latent")
    if samples.numel() == 0 or not (empty_allowed or samples.any()):
        raise ValueError(
            f"the latent of shape {tuple(samples.shape)} is empty; connect one that holds images, from VAEEncode or a sampler"
        )
    if not samples.isfinite().all():
        raise ValueError(
            "the latent has elements that are NaN or infinite: sample it again, or decode it to see where it went wrong"
        )
    latent_format = patcher.get_model_object("latent_format")
    if samples.shape[1] != latent_format.latent_channels:
        raise ValueError(
            f"the latent has {samples.shape[1]} channels and the model takes {latent_format.latent_channels}: "
            "encode the image with the VAE of this model"
        )
    wanted = latent_format.latent_dimensions + 2
    if samples.ndim != wanted:
        raise ValueError(
            f"the latent has shape {tuple(samples.shape)} and the model takes latents of {wanted} dimensions: connect an empty "
            "latent made for this model"
        )


class _Work(comfy.samplers.Sampler):
    """Stands where the host expects a sampler, and runs `function` instead; its `result` is there afterwards."""

    def __init__(self, function: Callable[[GuiderModel], Any], calls: int):
        self._function, self._calls = function, calls
        self.result: Any = None

    def sample(
        self,
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """As the host's `Sampler.sample`; returns the latent as it came."""
        # Derivatives do not exist in inference mode, in which the host runs nodes.
        with torch.inference_mode(False), torch.no_grad():
            x, noise = (v.to(compute_dtype(v.dtype), copy=True) for v in (latent_image, noise))
            with tqdm(total=self._calls, disable=disable_pbar) as bar:

                def expect(calls: int) -> None:
                    self._calls = bar.total = calls

                predict = GuiderDenoiser(guider, extra_args, len(x), self._shown(callback, bar))
                sampling = guider.inner_model.model_sampling
                self.result = self._function(GuiderModel(x, noise, path_of(sampling), sampling, predict, expect))
        return x

    def _shown(self, callback: Callable[..., None] | None, bar: tqdm) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def show(x: torch.Tensor, denoised: torch.Tensor) -> None:
            step = min(bar.n, self._calls - 1)
            bar.update(bar.n < self._calls)
            if callback is not None:
                callback(step, denoised, x, self._calls)

        return show


# How many times the size of the queries a matrix of attention scores may have; its derivative takes six of them.
_SCORES = 4

CACHE = "easycache"  # where the host's EasyCache and LazyCache are in a model's options


@dataclass(frozen=True)
class Probe:
    """A model that can be differentiated: how, and with which signs. reason: one sentence for a report."""

    predict: Denoiser
    path: NoisePath
    method: str
    reason: str
    dtype: torch.dtype
    seed: int

    def model(self, probes: int = 1, indices: Sequence[int] | None = None) -> ProbedModel:
        """An `Evaluate` with `probes` probes per evaluation; indices: see `divergence.rademacher`."""
        return ProbedModel(self.predict, self.path, self.method, self.dtype, self.seed, probes, indices)


def open_probe(
    guider: Any, predict: Denoiser, x: torch.Tensor, sigma: float, seed: int = 0, direction: torch.Tensor | None = None
) -> Probe:
    """The `Probe` of a guider's model, by the derivative that works on its network.

    That is tried at x (B, ...) with the noise level sigma, along direction (None: a random one): `divergence.TRIAL_CALLS`.
    What was found for an earlier run is not kept: a run depends on its inputs, not on what ran before.
    """
    dtype = network_dtype(guider.inner_model)
    direction = divergence.rademacher(x, seed, -1) if direction is None else direction
    method, reason = divergence.method_of(lambda x: predict(x, sigma), x, direction, dtype, sigma)
    return Probe(predict, path_of(guider.inner_model.model_sampling), method, reason, dtype, seed)


def middle_level(schedule: Schedule) -> Level | None:
    """A noise level for `open_probe`: in the middle of a schedule or below, above 0 and not pure noise; else None."""
    levels = schedule.levels
    return next((v for v in levels[len(levels) // 2 :] + levels[::-1] if v.sigma > 0 and v.alpha > 0), None)


def network_dtype(model: Any) -> torch.dtype:
    """The dtype in which a `BaseModel` of the host computes."""
    return model.manual_cast_dtype or model.get_dtype()


class GuiderDenoiser:
    """(x, sigma) -> denoised in batches of at most `batch` images, whose conditioning the host keeps in that order.

    The prediction is that of the model: this pack's density guidance of the run around it is left out. show(x, denoised):
    after every call.
    """

    def __init__(
        self,
        guider: Any,
        extra_args: dict[str, Any],
        batch: int,
        show: Callable[[torch.Tensor, torch.Tensor], None] = lambda x, denoised: None,
    ):
        """Raises ValueError for a model whose patch returns old predictions in place of new ones."""
        cache = extra_args["model_options"].get("transformer_options", {}).get(CACHE)
        if cache is not None:
            raise ValueError(
                f"the model carries {type(cache).__name__.removesuffix('Holder')}, which reuses earlier "
                "predictions, and this node needs a new one at every step: connect the model without it"
            )
        self._guider, self._batch, self._show = guider, batch, show
        self._seed = extra_args.get("seed")
        self._options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        transformer = self._options.setdefault("transformer_options", {})
        # Fused attention has no forward-mode derivative, nor has the host's sliced one where memory is short, and plain
        # attention takes memory without end.
        self._dual_options = {
            **self._options,
            "transformer_options": {"optimized_attention_override": _sliced_attention, **transformer},
        }

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.cat([self._call(part, sigma) for part in x.split(self._batch)])

    def _call(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        primal, tangent = forward_ad.unpack_dual(x)
        armed = self._guider.model_options
        self._guider.model_options = without_guidance(armed)
        try:
            denoised = self._guider(
                x,
                torch.full((len(x),), sigma, dtype=torch.float32, device=x.device),
                model_options=self._options if tangent is None else self._dual_options,
                seed=self._seed,
            )
        finally:
            self._guider.model_options = armed
        self._show(primal, forward_ad.unpack_dual(denoised).primal)
        return denoised


def _sliced_attention(
    _: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """The host's attention for some queries at a time, (B, N, heads * d) or (B, heads, N, d): see `_SCORES`."""
    tokens = max(1, _SCORES * query.numel() // (len(query) * heads * key.shape[-2]))
    queries = query.split(tokens, -2)
    masks = [mask] * len(queries) if mask is None or mask.shape[-2] != query.shape[-2] else mask.split(tokens, -2)
    return torch.cat(
        [attention.attention_pytorch(part, key, value, heads, m, *args, **kwargs) for part, m in zip(queries, masks)], -2
    )

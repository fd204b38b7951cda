"""One sampling run under density guidance: the settings, and what is hung into the host for their sake."""

import itertools
import logging
import re
from dataclasses import dataclass, field

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from tqdm.auto import tqdm

from ...dg_core import control, solver
from ...dg_core.schedule import Coordinates, coordinates_of
from ...dg_core.statistics import compute_dtype, dimension, region_of
from .inputs import CURVE, DETAIL_SHIFTS, LEVELS, MASK, QUANTILES, WINDOW, check_fields

WRAPPER_KEY = "density_guidance"


def require_window(start_percent, end_percent):
    """Raise ValueError unless both are shares of the sampling, the first smaller than the second."""
    for declared, value in zip(WINDOW, (start_percent, end_percent)):
        declared.check(value)
    if start_percent >= end_percent:
        raise ValueError(
            f"start_percent is {start_percent} and end_percent is {end_percent}; "
            "start_percent must be smaller than end_percent")


def require_batch(name, values, batch):
    """Raise ValueError unless `values` is None or has one number, or one for each of `batch` images."""
    if values and len(values) not in (1, batch):
        raise ValueError(f"{name} has {len(values)} numbers and the latent has {batch} images; "
                         f"give one number for all, or {batch}")


def repeated(values, count):
    """A single value `count` times; more are returned as they are."""
    return values * count if len(values) == 1 else values


def require_one_part(guider):
    """Raise ValueError where the latent of a run is several, packed."""
    if any("latent_shapes" in cond.get("model_conds", {}) for conds in guider.conds.values() for cond in conds):
        raise ValueError(
            "the latent packs several parts (video and audio) into one; density guidance needs one part: sample "
            "without it, or with neutral settings")


def range_of_percents(model_sampling, sigmas, coordinates, start_percent, end_percent):
    """The `GuidedRange` of the steps of a schedule (list of floats) between two shares of the model's sampling."""
    return control.guided_range(
        sigmas, coordinates, model_sampling.percent_to_sigma(start_percent), model_sampling.percent_to_sigma(end_percent))


@dataclass(frozen=True)
class GuidanceSettings:
    """The inputs that the guidance nodes share. Raises ValueError, naming the input, where one is out of range."""

    quantile: float = 0.5
    detail_shift: float = 0.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    quantiles: tuple[float, ...] | None = None  # one for each image, in the place of quantile
    detail_shifts: tuple[float, ...] | None = None  # likewise
    mask: torch.Tensor | None = field(default=None, compare=False)  # (N, height, width), from 0 to 1: where to guide
    curve: tuple[float, ...] | None = None  # strength from the beginning to the end of the guided range

    def __post_init__(self):
        check_fields(self, (*LEVELS, QUANTILES, DETAIL_SHIFTS, MASK, CURVE))
        if self.curve is not None:
            control.strength_curve(self.curve)
        require_window(self.start_percent, self.end_percent)

    @property
    def neutral(self):
        quantiles, detail_shifts = self.quantiles or (self.quantile,), self.detail_shifts or (self.detail_shift,)
        return all(q == 0.5 for q in quantiles) and not any(detail_shifts)

    @property
    def per_image(self):
        return bool(self.quantiles or self.detail_shifts)

    def require_batch(self, batch):
        """Raise ValueError unless the lists have one number or one for each of `batch` images."""
        require_batch("quantiles", self.quantiles, batch)
        require_batch("detail_shifts", self.detail_shifts, batch)

    def of_images(self, batch):
        """[(quantile, detail_shift)] of every image of a batch."""
        quantiles, detail_shifts = self.quantiles or (self.quantile,), self.detail_shifts or (self.detail_shift,)
        return list(zip(repeated(quantiles, batch), repeated(detail_shifts, batch)))


@dataclass(frozen=True)
class Steering:
    """The settings resolved for one run."""

    coordinates: Coordinates
    guided: control.GuidedRange
    z: float | torch.Tensor  # (B,), float64 on the CPU, where there is a mask or settings for each image
    dim: int | torch.Tensor  # D; (B,), likewise, where there is a mask
    mask: torch.Tensor | None  # of the inpainting, broadcastable to the latent
    weights: torch.Tensor | None = None  # likewise: how strongly each element is guided and counts
    curve: tuple[float, ...] | None = None

    @classmethod
    def of_run(cls, settings, guider, sigmas, latent, denoise_mask):
        """None where the run has no guided step. Reads the schedule once, before any model call."""
        settings.require_batch(len(latent))
        if settings.neutral:
            return None
        model_sampling = guider.inner_model.model_sampling
        coordinates = coordinates_of(model_sampling)
        guided = range_of_percents(
            model_sampling, sigmas.tolist(), coordinates, settings.start_percent, settings.end_percent)
        if guided.log_range == 0:
            logging.warning(
                "Density guidance: no step of this run of %d lies between start_percent %g and end_percent %g, the last step "
                "to zero noise and pure noise not counted; nothing is guided.",
                max(len(sigmas) - 1, 0), settings.start_percent, settings.end_percent)
            return None
        require_one_part(guider)
        mask = None if denoise_mask is None else denoise_mask.to(latent.device)
        weights = weights_of(settings, latent, mask)
        dim = dimension(latent, weights)
        curve = None if settings.curve is None else control.strength_curve(settings.curve)
        images = settings.of_images(len(latent))
        if torch.is_tensor(dim):
            dim = dim.cpu().double()  # the gain is rounded once, in the end
            dims = dim.tolist()
        else:
            dims = [dim] * len(latent)
        if not any(dims):
            logging.warning("Density guidance: no element of the latent lies in the mask; nothing is guided.")
            return None
        peak = max(curve or (1.0,))
        wanted = [control.z_value(*image, d, guided.log_range, peak) for image, d in zip(images, dims)]
        z = [control.limit_smoothing(v, d, guided.log_range) for v, d in zip(wanted, dims)]
        for quantile, detail_shift in dict.fromkeys(image for image, a, b in zip(images, z, wanted) if a < b):
            logging.warning(
                "Density guidance: quantile %g with detail_shift %g asks for an image smoother than the peak of a density; "
                "guided to %g bits per dimension, the most that can be reached.",
                quantile, detail_shift, control.SMOOTHEST)
        single = weights is None and not settings.per_image
        z = z[0] if single else torch.tensor(z, dtype=torch.float64)
        return cls(coordinates, guided, z, dim, mask, weights, curve)


def weights_of(settings, latent, denoise_mask):
    """How much each element of a latent counts, and how strongly it is changed: None, or broadcastable to the latent.

    The mask of the settings, within the region that an inpainting run replaces (denoise_mask: None, or from 0 to 1).
    """
    region = None if denoise_mask is None else region_of(denoise_mask)
    if settings.mask is None:
        return region
    weights = mask_for(settings.mask, latent)
    return weights if region is None else weights * region


def mask_for(mask, latent):
    """A mask (N, height, width) in the shape of a latent (B, channels, ...), resized as the host resizes noise masks.

    A video takes N masks as frames; a latent of one dimension takes the mean over the height.
    """
    mask = mask.float()
    if latent.ndim == 3:
        mask = mask.mean(1, keepdim=True)
    elif latent.ndim == 4:
        mask = mask.unsqueeze(1)
    return comfy.sampler_helpers.prepare_mask(mask, latent.shape, latent.device)


STOCHASTIC = re.compile(r"ancestral|sde|^(lcm.*|ddpm|seeds_\d|sa_solver.*)$")
OVERLAPPING = {"EpsilonScaling": "Epsilon Scaling", "TemporalScoreRescaling": "Temporal Score Rescaling"}


def advice(sampler_name, model_options):
    """What a user should know about guidance in this run: sentences for the log.

    sampler_name: as in the host's list of samplers, "" for another's. How much each sampler makes of the asked-for shift is
    in docs/detail_shift.md.
    """
    sentences = []
    if "cfg_pp" in sampler_name:
        sentences.append(
            f"{sampler_name} renoises with a prediction that is not guided, so that the shift is not the one asked for "
            "(measured from 0.4 to 43 times as much): use a smaller one, or the sampler without _cfg_pp")
    elif STOCHASTIC.search(sampler_name):
        sentences.append(
            f"{sampler_name} adds noise at every step and so forgets part of the guidance (measured, mostly 0.3 to 0.5 of the "
            "asked-for shift is left): deterministic samplers like euler, deis, uni_pc or the pack's own keep it")
    for function in model_options.get("sampler_post_cfg_function", ()):
        node = OVERLAPPING.get(getattr(function, "__qualname__", "").split(".")[0])
        if node:
            sentences.append(f"{node} scales the predicted noise too, so that the amounts add up")
    return sentences


def innermost(sampler):
    """The SAMPLER of the host behind one that may be guided."""
    while hasattr(sampler, "sampler"):  # of a `GuidedSampler`
        sampler = sampler.sampler
    return sampler


def function_of(sampler):
    """The host's sampler function behind a SAMPLER, guided or not; None where it has none."""
    return getattr(innermost(sampler), "sampler_function", None)


def name_of(sampler):
    """The host's name of a SAMPLER; "" where it has none."""
    return getattr(function_of(sampler), "__name__", "").removeprefix("sample_")


def adds_noise(sampler):
    """Whether a SAMPLER draws noise on its way, as far as its name and options tell."""
    options = getattr(innermost(sampler), "extra_options", {})
    if options.get("variation") is not None or options.get("s_churn"):
        return True
    return bool(STOCHASTIC.search(name_of(sampler))) and options.get("eta", 1.0) != 0


def outermost(model_options, kind, wrapper, key=None):
    """Copy of `model_options` in which `wrapper`, under `key`, surrounds all the others of its kind (a `WrappersMP`)."""
    key = WRAPPER_KEY if key is None else key
    options = comfy.model_patcher.create_model_options_clone(model_options)
    wrappers = options.setdefault("transformer_options", {}).setdefault("wrappers", {})
    present = wrappers.get(kind, {})
    wrappers[kind] = {key: [wrapper, *present.get(key, [])], **{k: v for k, v in present.items() if k != key}}
    return options


def without_guidance(model_options):
    """`model_options` in which this pack wraps no prediction: a copy, or the same object where it wraps none."""
    kind = comfy.patcher_extension.WrappersMP.PREDICT_NOISE
    present = model_options.get("transformer_options", {}).get("wrappers", {}).get(kind, {})
    if WRAPPER_KEY not in present:
        return model_options
    options = comfy.model_patcher.create_model_options_clone(model_options)
    options["transformer_options"]["wrappers"][kind] = {k: v for k, v in present.items() if k != WRAPPER_KEY}
    return options


class _GuidePrediction:
    """PREDICT_NOISE wrapper: guides what the guider returns, and remembers the unguided prediction for previews."""

    def __init__(self, steering):
        self._guide = control.PredictionGuide(
            steering.coordinates, steering.z, steering.dim, steering.guided, steering.weights, steering.curve)
        self._mask = steering.mask
        self.unguided = self.guided = None

    def __call__(self, executor, x, sigma, *args, **kwargs):
        self.unguided = executor(x, sigma, *args, **kwargs)
        self.guided = self._guide(x, self.unguided, sigma)
        return self.guided

    def preview(self, denoised):
        """The unguided counterpart of the prediction that a sampler reports."""
        if self.guided is None:
            return denoised
        if denoised is self.guided:
            unguided, self.unguided, self.guided = self.unguided, None, None  # memory for the next step
            return unguided
        # An inpainting run reports the blend of the prediction with the original.
        change = self.unguided - self.guided
        return denoised + (change if self._mask is None else change * self._mask)


def run_guided(settings, sample, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               *args, **kwargs):
    """Call `sample`, a `Sampler.sample` or an executor of it, with guidance of all that the guider predicts.

    Post-CFG functions would come too early: some guiders combine predictions after those. Neutral settings, or a range
    without a step, call `sample` with what came in. Arguments and result as in the host's `Sampler.sample`.
    """
    steering = Steering.of_run(settings, guider, sigmas, noise, denoise_mask)
    if steering is None:
        return sample(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
    sampler = getattr(sample, "class_obj", None) or getattr(sample, "__self__", None)  # an executor of the host, or a method
    for sentence in advice(name_of(sampler), guider.model_options):
        logging.warning("Density guidance: %s.", sentence)
    guide = _GuidePrediction(steering)
    show = callback and (lambda step, denoised, x, total: callback(step, guide.preview(denoised), x, total))
    options = guider.model_options
    guider.model_options = outermost(options, comfy.patcher_extension.WrappersMP.PREDICT_NOISE, guide)
    try:
        return sample(guider, sigmas, extra_args, show, noise, latent_image, denoise_mask, *args, **kwargs)
    finally:
        guider.model_options = options


class GuidedSampler(comfy.samplers.Sampler):
    """Any of the host's samplers under density guidance."""

    def __init__(self, sampler, settings):
        self.sampler = sampler
        self.settings = settings

    def sample(self, *args, **kwargs):
        return run_guided(self.settings, self.sampler.sample, *args, **kwargs)


def solver_sampler(settings, variation=None):
    """The pack's own solver as a sampler of the host; variation: see `sample_density_guided`."""
    return comfy.samplers.KSAMPLER(sample_density_guided, {"settings": settings, "variation": variation})


@torch.no_grad()
def sample_density_guided(model, x, sigmas, extra_args=None, callback=None, disable=None, settings=GuidanceSettings(),
                          variation=None):
    """`dg_core.solver.solve` with the signature of the host's sampler functions.

    variation: None, or an object whose of_run(guider, sigmas, start) is a `dg_core.variation.Variation` or None.
    """
    extra_args = extra_args or {}
    guider = model.inner_model
    mask = extra_args.get("denoise_mask")
    steering = Steering.of_run(settings, guider, sigmas, x, mask)
    schedule = list(itertools.accumulate(sigmas.tolist(), min))  # the last one may rise by a rounding
    if steering is None:
        coordinates = coordinates_of(guider.inner_model.model_sampling)
        guided = control.guided_range(sigmas.tolist(), coordinates)  # refuses a schedule that ascends
        steering = Steering(coordinates, guided, 0.0, 1, mask, weights_of(settings, x, mask))
    dtype, wide = x.dtype, compute_dtype(x.dtype)
    if variation is not None:
        noise = getattr(model, "noise", x)  # a wrapper of the model may hide it
        variation = variation.of_run(guider, schedule, noise if noise.any() else x)
    if variation is not None and steering.weights is not None and not steering.weights.any():
        logging.warning("Stochastic detail variation: no element of the latent lies in the mask; nothing is varied.")
        variation = None

    def predict(x, sigma):
        if variation is not None:  # there may be many calls between two callbacks
            comfy.model_management.throw_exception_if_processing_interrupted()
        return model(x.to(dtype), x.new_full((len(x),), sigma, dtype=torch.float32), **extra_args).to(wide)

    with tqdm(total=len(schedule) - 1, disable=disable) as bar:
        def step_done(i, x, denoised):
            bar.update()
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})

        return solver.solve(predict, x.to(wide), schedule, steering.coordinates, steering.guided,
                            steering.z, steering.dim, steering.mask, step_done, steering.weights, steering.curve,
                            variation=variation).to(dtype)

"""One sampling run under density guidance: the settings, and what is hung into the host for their sake."""

import logging
from dataclasses import dataclass

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from tqdm.auto import tqdm

from ..dg_core import guidance, solver
from ..dg_core.coordinates import Coordinates, coordinates_of
from ..dg_core.statistics import compute_dtype, dimension, region_of
from ..dg_core.units import quantile_to_z, require_number


def require_window(start_percent, end_percent):
    """Raise ValueError unless both are shares of the sampling, the first smaller than the second."""
    require_number("start_percent", start_percent, 0.0, 1.0)
    require_number("end_percent", end_percent, 0.0, 1.0)
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
            "without it, or with quantile 0.5 and detail_shift 0")


def range_of_percents(model_sampling, sigmas, coordinates, start_percent, end_percent):
    """The `GuidedRange` of the steps of a schedule (list of floats) between two shares of the model's sampling."""
    return guidance.guided_range(
        sigmas, coordinates, model_sampling.percent_to_sigma(start_percent), model_sampling.percent_to_sigma(end_percent))


QUANTILES = (0.001, 0.999)
DETAIL_SHIFTS = (-2.0, 2.0)


@dataclass(frozen=True)
class GuidanceSettings:
    """The inputs that the guidance nodes share. Raises ValueError, naming the input, where one is out of range."""

    quantile: float = 0.5
    detail_shift: float = 0.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    quantiles: tuple[float, ...] | None = None  # one for each image, in the place of quantile
    detail_shifts: tuple[float, ...] | None = None  # likewise

    def __post_init__(self):
        require_number("quantile", self.quantile, *QUANTILES)
        require_number("detail_shift", self.detail_shift, *DETAIL_SHIFTS)
        for i, value in enumerate(self.quantiles or ()):
            require_number(f"quantiles, for image {i},", value, *QUANTILES)
        for i, value in enumerate(self.detail_shifts or ()):
            require_number(f"detail_shifts, for image {i},", value, *DETAIL_SHIFTS)
        require_window(self.start_percent, self.end_percent)

    @property
    def neutral(self):
        quantiles, detail_shifts = self.quantiles or (self.quantile,), self.detail_shifts or (self.detail_shift,)
        return not any(quantile_to_z(q) for q in quantiles) and not any(detail_shifts)

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
    guided: guidance.GuidedRange
    z: float | torch.Tensor  # (B,), float64 on the CPU, where there is a mask or settings for each image
    dim: int | torch.Tensor  # D; (B,), likewise, where there is a mask
    mask: torch.Tensor | None  # of the inpainting, broadcastable to the latent

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
            return None
        require_one_part(guider)
        mask = None if denoise_mask is None else denoise_mask.to(latent.device)
        dim = dimension(latent, None if mask is None else region_of(mask))
        images = settings.of_images(len(latent))
        if torch.is_tensor(dim):
            dim = dim.cpu().double()  # the gain is rounded once, in the end
            dims = dim.tolist()
        else:
            dims = [dim] * len(latent)
        wanted = [guidance.z_value(*image, d, guided.log_range) for image, d in zip(images, dims)]
        z = [guidance.limit_smoothing(v, d, guided.log_range) for v, d in zip(wanted, dims)]
        for quantile, detail_shift in dict.fromkeys(image for image, a, b in zip(images, z, wanted) if a < b):
            logging.warning(
                "Density guidance: quantile %g with detail_shift %g asks for an image smoother than the peak of a density; "
                "guided to %g bits per dimension, the most that can be reached.",
                quantile, detail_shift, guidance.SMOOTHEST)
        single = mask is None and not settings.per_image
        return cls(coordinates, guided, z[0] if single else torch.tensor(z, dtype=torch.float64), dim, mask)


class _GuidePrediction:
    """Post-CFG function: guides the final prediction, and remembers the unguided one for previews."""

    def __init__(self, steering):
        region = None if steering.mask is None else region_of(steering.mask)
        self._guide = guidance.PredictionGuide(steering.coordinates, steering.z, steering.dim, steering.guided, region)
        self._mask = steering.mask
        self.unguided = self.guided = None

    def __call__(self, args):
        self.unguided = args["denoised"]
        self.guided = self._guide(args["input"], self.unguided, args["sigma"])
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
    """Call `sample`, a `Sampler.sample` or an executor of it, with the guidance as the last post-CFG function.

    Neutral settings, or a range without a step, call `sample` with what came in. Arguments and result as in the
    host's `Sampler.sample`.
    """
    steering = Steering.of_run(settings, guider, sigmas, noise, denoise_mask)
    if steering is None:
        return sample(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
    guide = _GuidePrediction(steering)
    options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
    extra_args = {
        **extra_args,
        "model_options": comfy.model_patcher.set_model_options_post_cfg_function(options, guide),
    }
    show = callback and (lambda step, denoised, x, total: callback(step, guide.preview(denoised), x, total))
    return sample(guider, sigmas, extra_args, show, noise, latent_image, denoise_mask, *args, **kwargs)


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

    variation: None, or an object whose of_run(guider, sigmas, batch) is a `dg_core.variation.Variation` or None.
    """
    extra_args = extra_args or {}
    guider = model.inner_model
    steering = Steering.of_run(settings, guider, sigmas, x, extra_args.get("denoise_mask"))
    schedule = sigmas.tolist()
    if steering is None:
        coordinates = coordinates_of(guider.inner_model.model_sampling)
        steering = Steering(coordinates, guidance.guided_range(schedule, coordinates), 0.0, 1, extra_args.get("denoise_mask"))
    dtype, wide = x.dtype, compute_dtype(x.dtype)
    variation = variation and variation.of_run(guider, schedule, len(x))

    def predict(x, sigma):
        if variation is not None:  # there may be many calls between two callbacks
            comfy.model_management.throw_exception_if_processing_interrupted()
        return model(x.to(dtype), x.new_full((len(x),), sigma, dtype=dtype), **extra_args).to(wide)

    with tqdm(total=len(schedule) - 1, disable=disable) as bar:
        def step_done(i, x, denoised):
            bar.update()
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})

        return solver.solve(predict, x.to(wide), schedule, steering.coordinates, steering.guided,
                            steering.z, steering.dim, steering.mask, step_done, variation).to(dtype)

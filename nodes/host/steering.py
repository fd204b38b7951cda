"""One sampling run under density guidance: settings, the control of the run, and the wrapper that applies it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import torch
from tqdm.auto import tqdm

from ...dg_core.control import SMOOTHEST, Control, gain_of, guided_prediction, strength_curve
from ...dg_core.levels import longest_step
from ...dg_core.schedule import NoisePath, Schedule
from ...dg_core.solver import solve
from ...dg_core.statistics import compute_dtype, dimension
from .advice import advice, name_of
from .inputs import (
    CURVE,
    DETAIL_SHIFT,
    DETAIL_SHIFTS,
    END_PERCENT,
    LEVELS,
    MASK,
    QUANTILE,
    QUANTILES,
    START_PERCENT,
    check_fields,
)
from .masks import weights_of
from .model_access import path_of, require_one_part
from .settings import repeated, require_batch, require_window, steps_of_percents
from .variation_run import VariationSettings
from .wrappers import outermost


@dataclass(frozen=True)
class GuidanceSettings:
    """The inputs that the guidance nodes share. Raises ValueError, naming the input, where one is out of range."""

    quantile: float = QUANTILE.default
    detail_shift: float = DETAIL_SHIFT.default
    start_percent: float = START_PERCENT.default
    end_percent: float = END_PERCENT.default
    quantiles: Sequence[float] | None = None  # one for each image, in place of quantile
    detail_shifts: Sequence[float] | None = None  # likewise
    mask: torch.Tensor | None = field(default=None, compare=False)  # (N, height, width), from 0 to 1: where to guide
    curve: Sequence[float] | None = None  # strength from the beginning to the end of the guided range

    def __post_init__(self) -> None:
        check_fields(self, (*LEVELS, QUANTILES, DETAIL_SHIFTS, MASK, CURVE))
        if self.curve is not None:
            strength_curve(self.curve)
        require_window(self.start_percent, self.end_percent)

    @property
    def neutral(self) -> bool:
        """Whether nothing is to be guided."""
        quantiles, detail_shifts = self.quantiles or (self.quantile,), self.detail_shifts or (self.detail_shift,)
        return all(q == 0.5 for q in quantiles) and not any(detail_shifts)

    @property
    def per_image(self) -> bool:
        """Whether images have settings of their own."""
        return bool(self.quantiles or self.detail_shifts)

    def require_batch(self, batch: int) -> None:
        """Raise ValueError unless the lists have one number or one for each of `batch` images."""
        require_batch("quantiles", self.quantiles, batch)
        require_batch("detail_shifts", self.detail_shifts, batch)

    def of_images(self, batch: int) -> list[tuple[float, float]]:
        """[(quantile, detail_shift)] of every image of a batch."""
        quantiles, detail_shifts = self.quantiles or (self.quantile,), self.detail_shifts or (self.detail_shift,)
        return list(zip(repeated(quantiles, batch), repeated(detail_shifts, batch)))


# On the clock of `levels`. 20 steps that meet the amount have none above 0.7; "simple" on a flow has 1.3, and misses by 0.4.
LONG_STEP = 1.0


def control_of(
    settings: GuidanceSettings, guider: Any, schedule: Schedule, latent: torch.Tensor, denoise_mask: torch.Tensor | None
) -> Control | None:
    """The `Control` of a run, from its settings; None where nothing is guided, which the log says.

    latent: (B, ...), of the run's device and dtype. denoise_mask: of an inpainting run, on that device.
    """
    steps = steps_of_percents(guider.inner_model.model_sampling, schedule, settings.start_percent, settings.end_percent)
    if steps is None:
        logging.warning(
            "Density guidance: none of the %d steps lies between start_percent %g and end_percent %g (the last step to zero "
            "noise and pure noise do not count); nothing is guided.",
            schedule.steps,
            settings.start_percent,
            settings.end_percent,
        )
        return None
    require_one_part(guider)
    length, start, stop = longest_step([level.s for level in schedule.levels], latent[0].numel())
    if length > LONG_STEP:
        logging.warning(
            "Density guidance: the step from noise level %.3g to %.3g (sigma / alpha) is too long: the amount of detail is "
            "decided there and will be missed. Use more steps, or Density Scheduler.",
            start,
            stop,
        )
    weights = weights_of(settings.mask, latent, denoise_mask)
    dims = dimension(latent, weights)
    if not any(dims):
        logging.warning("Density guidance: no element of the latent lies in the mask; nothing is guided.")
        return None
    curve = None if settings.curve is None else strength_curve(settings.curve)
    images = settings.of_images(len(latent))
    gains = [gain_of(*image, dim, steps.log_range, max(curve or (1.0,))) for image, dim in zip(images, dims)]
    for quantile, detail_shift in dict.fromkeys(image for image, (_, cut) in zip(images, gains) if cut):
        logging.warning(
            "Density guidance: quantile %g with detail_shift %g asks for images beyond the peak of the density; guided to %g "
            "bits per dimension, the smoothest that can be reached.",
            quantile,
            detail_shift,
            SMOOTHEST,
        )
    single = weights is None and not settings.per_image
    like = latent.new_empty((), dtype=compute_dtype(latent.dtype))
    gain = gains[0][0] if single else like.new_tensor([gain for gain, _ in gains])
    return Control(steps, gain, weights, None if curve is None else like.new_tensor(curve))


class _GuidePrediction:
    """PREDICT_NOISE wrapper: guides what the guider returns, and remembers the unguided prediction for previews."""

    def __init__(self, control: Control, path: NoisePath, mask: torch.Tensor | None):
        self._control, self._path, self._mask = control, path, mask
        self.unguided: torch.Tensor | None = None
        self.guided: torch.Tensor | None = None

    def __call__(
        self, executor: Callable[..., torch.Tensor], x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self.unguided = executor(x, sigma, *args, **kwargs)
        self.guided = guided_prediction(self._control, self._path, x, self.unguided, sigma)
        return self.guided

    def preview(self, denoised: torch.Tensor) -> torch.Tensor:
        """The unguided counterpart of the prediction that a sampler reports."""
        if self.guided is None or self.unguided is None:
            return denoised
        if denoised is self.guided:
            unguided, self.unguided, self.guided = self.unguided, None, None  # memory for the next step
            return unguided
        # An inpainting run reports the blend of the prediction with the original.
        change = self.unguided - self.guided
        return denoised + (change if self._mask is None else change * self._mask)


def run_guided(
    settings: GuidanceSettings,
    sample: Callable[..., torch.Tensor],
    guider: Any,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    callback: Callable[..., None] | None,
    noise: torch.Tensor,
    latent_image: torch.Tensor | None = None,
    denoise_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Call `sample`, a `Sampler.sample` or an executor of it, with guidance of all that the guider predicts.

    Post-CFG functions would come too early: some guiders combine predictions after those. Neutral settings, or a window
    without a step, call `sample` with what came in. Arguments and result as in the host's `Sampler.sample`.
    """
    settings.require_batch(len(noise))
    control = None
    if not settings.neutral:
        schedule = Schedule(path_of(guider.inner_model.model_sampling), sigmas.tolist())
        mask = None if denoise_mask is None else denoise_mask.to(noise.device)
        control = control_of(settings, guider, schedule, noise, mask)
    if control is None:
        return sample(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
    sampler = getattr(sample, "class_obj", None) or getattr(sample, "__self__", None)  # an executor of the host, or a method
    for sentence in advice(name_of(sampler), guider.model_options):
        logging.warning("Density guidance: %s.", sentence)
    guide = _GuidePrediction(control, schedule.path, mask)

    def show(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        if callback is not None:
            callback(step, guide.preview(denoised), x, total)

    options = guider.model_options
    guider.model_options = outermost(options, comfy.patcher_extension.WrappersMP.PREDICT_NOISE, guide)
    try:
        return sample(guider, sigmas, extra_args, callback and show, noise, latent_image, denoise_mask, *args, **kwargs)
    finally:
        guider.model_options = options


def guided_patch(model: Any, settings: GuidanceSettings) -> Any:
    """A MODEL whose runs are guided: a clone with a wrapper, or the model itself where the settings are neutral."""
    if settings.neutral:
        return model

    def guide_run(executor: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        return run_guided(settings, executor, *args, **kwargs)

    patched = model.clone()
    patched.add_wrapper(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, guide_run)
    return patched


class GuidedSampler(comfy.samplers.Sampler):
    """Any of the host's samplers under density guidance."""

    def __init__(self, sampler: comfy.samplers.Sampler, settings: GuidanceSettings):
        self.sampler = sampler
        self.settings = settings

    def sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `run_guided`."""
        return run_guided(self.settings, self.sampler.sample, *args, **kwargs)


def solver_sampler(settings: GuidanceSettings, variation: VariationSettings | None = None) -> comfy.samplers.Sampler:
    """The pack's own solver as a sampler of the host."""
    return comfy.samplers.KSAMPLER(sample_density_guided, {"settings": settings, "variation": variation})


@torch.no_grad()
def sample_density_guided(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    settings: GuidanceSettings = GuidanceSettings(),
    variation: VariationSettings | None = None,
) -> torch.Tensor:
    """`dg_core.solver.solve` with the signature of the host's sampler functions."""
    extra_args = extra_args or {}
    guider = model.inner_model
    schedule = Schedule(path_of(guider.inner_model.model_sampling), sigmas.tolist())
    mask = extra_args.get("denoise_mask")
    settings.require_batch(len(x))
    control = None if settings.neutral else control_of(settings, guider, schedule, x, mask)
    dtype, wide = x.dtype, compute_dtype(x.dtype)
    noise = None
    if variation is not None:
        start = getattr(model, "noise", x)  # a wrapper of the model may hide it
        noise = variation.of_run(guider, schedule, x, start if start.any() else x, settings.mask, mask)

    def predict(x: torch.Tensor, sigma: float) -> torch.Tensor:
        if noise is not None:  # there may be many calls between two callbacks
            comfy.model_management.throw_exception_if_processing_interrupted()
        return model(x.to(dtype), x.new_full((len(x),), sigma, dtype=torch.float32), **extra_args).to(wide)

    with tqdm(total=schedule.steps, disable=disable) as bar:

        def step_done(i: int, x: torch.Tensor, denoised: torch.Tensor) -> None:
            bar.update()
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})

        return solve(predict, x.to(wide), schedule, control, noise, step_done, mask=mask).to(dtype)

"""A sampler that ends at a wanted log-density."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io
from tqdm.auto import tqdm

from ..dg_core.control import GuidedSteps, guided_steps
from ..dg_core.log_density import Evaluate, bits_of_state, log_start, state_of_bits
from ..dg_core.schedule import Schedule
from ..dg_core.statistics import compute_dtype
from ..dg_core.target import Reached, TrackedRuns, reach
from ..dg_core.units import bits_per_dim_to_nats, require_number, require_whole
from .host.inputs import CATEGORY, PROBES
from .host.model_access import Predict, middle_level, open_probe, path_of, require_one_part
from .host.steering import GuidanceSettings, sample_density_guided

ABSOLUTE, SHIFT, SAME = "bits per dimension", "shift from the unguided run", "same for the whole batch"
MAX_PASSES, REFERENCE_IMAGES = (1, 20), (-1, 4095)
UNCERTAIN = 10  # times the tolerance
PROBE_SEED_OFFSET = 0x6A09E667F3BCC908  # the probes of a run are not those of a readout with the same seed


@dataclass(frozen=True)
class TargetSettings:
    """The inputs of `DensityTargetSampler`. Raises ValueError, naming the input, where one is out of range."""

    target: str = SHIFT
    value: float = 0.0
    reference_image: int = -1
    tolerance: float = 0.002
    max_passes: int = 2
    probes: int = 1

    def __post_init__(self) -> None:
        if self.target not in (ABSOLUTE, SHIFT, SAME):
            raise ValueError(f"target is {self.target!r}; it must be one of: {ABSOLUTE}, {SHIFT}, {SAME}")
        require_number("value", self.value, -20.0, 20.0)
        require_number("tolerance", self.tolerance, 0.0, 1.0)
        require_whole("max_passes", self.max_passes, *MAX_PASSES)
        require_whole("probes", self.probes, *PROBES)
        require_whole("reference_image", self.reference_image, *REFERENCE_IMAGES)

    @property
    def neutral(self) -> bool:
        """Whether nothing is to be reached."""
        return self.target == SHIFT and self.value == 0

    def target_of(self, unguided: torch.Tensor, dim: int, s_end: float) -> torch.Tensor:
        """Wanted log p_u at the end, (B,) in nats, from that of the unguided run."""
        if self.target == SHIFT:
            return unguided + bits_per_dim_to_nats(self.value, dim)
        if self.target == ABSOLUTE:
            return torch.full_like(unguided, state_of_bits(self.value, s_end, dim))
        wanted = unguided.median() if self.reference_image < 0 else unguided[self.reference_image]
        return wanted.expand_as(unguided).clone()


class DensityTargetSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DensityTargetSampler",
            display_name="Density Target Sampler",
            category=CATEGORY,
            description="A sampler that ends at an exact log-density: a number of bits per dimension, a shift, or the same "
                        "for every image of a batch. Tracks the density while it samples, with derivatives of the model: "
                        "an unguided run, and one or more guided ones.",
            inputs=[
                io.Combo.Input(
                    "target", options=[ABSOLUTE, SHIFT, SAME], default=SHIFT,
                    tooltip="What to reach, at the last noise level above 0: value as -log2 p / D itself; as a difference "
                            "to what the same noise gives without guidance (neutral with value 0); or every image alike."),
                io.Float.Input(
                    "value", default=0.0, min=-20.0, max=20.0, step=0.01, round=0.0001,
                    tooltip="Bits per dimension (-log2 p / D); more means more detail. Not used for the same for the whole "
                            "batch. As a shift 0 is neutral."),
                io.Int.Input(
                    "reference_image", default=-1, min=REFERENCE_IMAGES[0], max=REFERENCE_IMAGES[1],
                    tooltip="For the same for the whole batch: the number of the image, from 0, whose unguided value all get. "
                            "-1 (neutral): the median of the batch."),
                io.Float.Input(
                    "tolerance", default=0.002, min=0.0, max=1.0, step=0.001, round=0.00001,
                    tooltip="Bits per dimension by which a pass may miss before another one corrects it. The error of the "
                            "tracked value itself comes on top; more probes lower it. 0.002 is the default."),
                io.Int.Input(
                    "max_passes", default=2, min=MAX_PASSES[0], max=MAX_PASSES[1],
                    tooltip="Number of guided passes, at most, after the unguided one; each is a whole sampling run, with as "
                            "many model calls per step as probes asks for. 2 is the default."),
                io.Int.Input(
                    "probes", default=1, min=PROBES[0], max=PROBES[1],
                    tooltip="Number of random probes of the divergence per step. Each costs a model call with its "
                            "derivative, which takes about two plain ones; or three calls where the model gives no "
                            "derivative. 1 is the default and the least."),
            ],
            outputs=[io.Sampler.Output(
                display_name="sampler",
                tooltip="The sampler, for SamplerCustomAdvanced or DensityTrace. What it achieved is in the log and in the "
                        "trace.")],
        )

    @classmethod
    def execute(cls, target, value, reference_image, tolerance, max_passes, probes):
        settings = TargetSettings(target, value, reference_image, tolerance, max_passes, probes)
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_to_target, {"settings": settings}))


@dataclass(frozen=True)
class TargetResult:
    """What a run to a target came to, per image in bits per dimension at the noise level s, and its tracked passes."""

    target: list[float]
    achieved: list[float]
    standard_error: list[float]
    unguided: list[float]
    s: float
    reached: Reached

    @classmethod
    def of(cls, reached: Reached, dim: int, s: float) -> "TargetResult":
        """From `target.reach`, of images with dim elements that end at s."""
        target, achieved, unguided = (
            bits_of_state(v, s, dim).tolist() for v in (reached.target, reached.achieved, reached.unguided))
        return cls(target, achieved, (reached.standard_error / (dim * math.log(2))).tolist(), unguided, s, reached)


def sample_to_target(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None, disable: bool | None = None,
    settings: TargetSettings = TargetSettings(), report: Callable[[TargetResult], None] | None = None,
    new_evaluate: Callable[[], Evaluate] | None = None,
) -> torch.Tensor:
    """Explicit control with the signature of the host's sampler functions.

    report: gets the result, unless the settings are neutral. new_evaluate: see `TrackedRuns`, in place of probes.
    """
    extra_args = extra_args or {}
    if settings.neutral:
        return sample_density_guided(model, x, sigmas, extra_args, callback, disable, GuidanceSettings())
    guider = model.inner_model
    schedule = Schedule(path_of(guider.inner_model.model_sampling), sigmas.tolist())
    schedule = Schedule(schedule.path, list(dict.fromkeys(schedule.sigmas)))  # a track takes one evaluation at each level
    guided = _check(settings, schedule, x, extra_args)
    require_one_part(guider)
    steps, dim, dtype = len(sigmas) - 1, x[0].numel(), x.dtype
    with torch.inference_mode(False), torch.no_grad(), tqdm(total=steps, disable=disable) as bar:
        x = x.to(compute_dtype(dtype), copy=True)
        predict = Predict(guider, extra_args, len(x))
        if new_evaluate is None:
            new_evaluate = _probing(guider, predict, x, schedule, settings, extra_args.get("seed"))
        start = log_start(predict, x, schedule.levels[0], new_evaluate()(x, schedule.sigmas[0], 0))

        def step_done(done: int, x: torch.Tensor, denoised: torch.Tensor) -> None:
            step = min(steps - 1, int(done * steps / ((1 + settings.max_passes) * len(schedule.sigmas))))
            bar.update(step + 1 - bar.n)
            if callback is not None:
                callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": denoised})

        runs = TrackedRuns(new_evaluate, x, schedule, guided, start, step_done)
        reached = reach(runs, lambda unguided: settings.target_of(unguided, dim, runs.s_end),
                        -bits_per_dim_to_nats(settings.tolerance, dim), settings.max_passes)
        bar.update(steps - bar.n)
        result = TargetResult.of(reached, dim, runs.s_end)
        _log(result, settings)
        if report is not None:
            report(result)
        return reached.x.to(dtype)


def _check(settings: TargetSettings, schedule: Schedule, x: torch.Tensor, extra_args: dict[str, Any]) -> GuidedSteps:
    """The steps of a run to a target. Raises ValueError, naming the input, where there is no such run."""
    if extra_args.get("denoise_mask") is not None:
        raise ValueError("the latent has a noise mask; a target is a density of the whole image: remove the mask, or use "
                         "DensityGuidanceSampler")
    steps = guided_steps(schedule)
    if steps is None:
        raise ValueError("sigmas have no step between two noise levels above 0 that could be guided; use a longer "
                         "schedule, or target 'shift from the unguided run' with value 0")
    if settings.target == SAME and settings.reference_image >= len(x):
        raise ValueError(f"reference_image is {settings.reference_image}, and the batch has {len(x)} images: choose 0 "
                         f"to {len(x) - 1}, or -1 for the median")
    return steps


def _probing(
    guider: Any, predict: Predict, x: torch.Tensor, schedule: Schedule, settings: TargetSettings, seed: int | None
) -> Callable[[], Evaluate]:
    """new_evaluate of `TrackedRuns` with random probes.

    All images get the same probes: where their Jacobians are alike so are the errors, and their differences small.
    """
    sigma = middle_level(schedule).sigma
    probe = open_probe(guider, predict, x / schedule.sigmas[0] * sigma, sigma, ((seed or 0) + PROBE_SEED_OFFSET) % 2**64)
    same = [0] * len(x)
    return lambda: probe.model(int(settings.probes), same)


def _log(result: TargetResult, settings: TargetSettings) -> None:
    """The achieved values to the log; a warning for what was not reached."""
    for i, (wanted, got, error) in enumerate(zip(result.target, result.achieved, result.standard_error)):
        text = f"image {i}: {got:.4f} ± {error:.4f} bits per dimension at s = {result.s:.4g}, target {wanted:.4f}"
        if not abs(got - wanted) <= settings.tolerance:  # NaN is not reached either
            logging.warning("Density target not reached in %d passes; %s. That is the nearest that was: ask for less, "
                            "guide a longer schedule, or allow more passes.", result.reached.passes, text)
        elif settings.target == ABSOLUTE and error > UNCERTAIN * settings.tolerance:
            logging.warning("Density target: %s. The number itself is uncertain: the schedule begins where the image still shows "
                            "(denoise below 1), or few probes read it. 'shift from the unguided run' does not need it.", text)
        else:
            logging.info("Density target: %s", text)

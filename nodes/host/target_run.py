"""Runs of the host that end at a wanted log-density: the settings, and the sampler function."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from tqdm.auto import tqdm

from ...dg_core.control import GuidedSteps, guided_steps
from ...dg_core.log_density import Evaluate, bits_of_state, log_start, state_of_bits
from ...dg_core.schedule import Schedule, brief
from ...dg_core.statistics import compute_dtype
from ...dg_core.target import Reached, TrackedRuns, reach
from ...dg_core.units import bits_per_dim_to_nats, error_bits_per_dim
from .inputs import BITS, PROBES, Choice, Number, check_fields, defaults, require_no_mask
from .model_access import GuiderDenoiser, middle_level, open_probe, path_of, require_one_part
from .steering import GuidanceSettings, sample_density_guided

ABSOLUTE, SHIFT, SAME = "bits per dimension", "shift from the unguided run", "same for the whole batch"
INPUTS = (
    Choice(
        "target",
        "What to reach at the last noise level above 0. 'bits per dimension': value is -log2 p / D itself. 'shift "
        "from the unguided run': value is the change from what the same noise gives without guidance. 'same for the whole "
        "batch': every image gets the same amount.",
        options=(ABSOLUTE, SHIFT, SAME),
        default=SHIFT,
        neutral=f"{SHIFT}, with value 0",
    ),
    Number(
        "value",
        "The amount of detail; larger means more. Not used for 'same for the whole batch'.",
        unit=BITS,
        default=0.0,
        neutral="0, as a shift",
        low=-20.0,
        high=20.0,
        round=0.0001,
    ),
    Number(
        "reference_image",
        "For 'same for the whole batch'. Number of the image, from 0, whose unguided amount every image "
        "gets; -1 is the median of the batch.",
        default=-1,
        neutral=-1,
        low=-1,
        high=4095,
    ),
    Number(
        "tolerance",
        "Another pass follows while an image misses by more than this. The measurement has an error of its own; more "
        "probes lower it.",
        unit=BITS,
        default=0.002,
        low=0.0,
        high=1.0,
        step=0.001,
        round=0.00001,
    ),
    Number(
        "max_passes",
        "Number of guided passes at most, after the unguided one. Each is a whole sampling run. The first one only measures: "
        "2 come near the target, 3 usually meet it.",
        default=3,
        low=1,
        high=20,
    ),
    PROBES,
)
UNCERTAIN = 10  # times the tolerance
PROBE_SEED_OFFSET = 0x6A09E667F3BCC908  # the probes of a run are not those of a readout with the same seed
_DEFAULT = defaults(INPUTS)


@dataclass(frozen=True)
class TargetSettings:
    """The inputs of Density Target Sampler. Raises ValueError, naming the input, where one is out of range."""

    target: str = _DEFAULT["target"]
    value: float = _DEFAULT["value"]
    reference_image: int = _DEFAULT["reference_image"]
    tolerance: float = _DEFAULT["tolerance"]
    max_passes: int = _DEFAULT["max_passes"]
    probes: int = _DEFAULT["probes"]

    def __post_init__(self) -> None:
        check_fields(self, INPUTS)

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
            bits_of_state(v, s, dim).tolist() for v in (reached.target, reached.achieved, reached.unguided)
        )
        return cls(target, achieved, error_bits_per_dim(reached.standard_error, dim).tolist(), unguided, s, reached)


class TargetSampler(comfy.samplers.KSAMPLER):
    """A SAMPLER of the host for explicit control. report, new_evaluate: see `sample_to_target`."""

    def __init__(
        self,
        settings: TargetSettings,
        report: Callable[[TargetResult], None] | None = None,
        new_evaluate: Callable[[], Evaluate] | None = None,
    ):
        super().__init__(functools.partial(sample_to_target, settings=settings, report=report, new_evaluate=new_evaluate))
        self.settings, self.new_evaluate = settings, new_evaluate


def sample_to_target(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    settings: TargetSettings = TargetSettings(),
    report: Callable[[TargetResult], None] | None = None,
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
        predict = GuiderDenoiser(guider, extra_args, len(x))
        if new_evaluate is None:
            new_evaluate = _probing(guider, predict, x, schedule, settings, extra_args.get("seed"))
        start = log_start(predict, x, schedule.levels[0], new_evaluate()(x, schedule.sigmas[0], 0))

        def step_done(done: int, x: torch.Tensor, denoised: torch.Tensor) -> None:
            step = min(steps - 1, int(done * steps / ((2 + settings.max_passes) * len(schedule.sigmas))))
            bar.update(step + 1 - bar.n)
            if callback is not None:
                callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": denoised})

        runs = TrackedRuns(new_evaluate, predict, x, schedule, guided, start, step_done)
        reached = reach(
            runs,
            lambda unguided: settings.target_of(unguided, dim, runs.s_end),
            -bits_per_dim_to_nats(settings.tolerance, dim),
            settings.max_passes,
        )
        bar.update(steps - bar.n)
        result = TargetResult.of(reached, dim, runs.s_end)
        _log(result, settings)
        if report is not None:
            report(result)
        return reached.x.to(dtype)


def _check(settings: TargetSettings, schedule: Schedule, x: torch.Tensor, extra_args: dict[str, Any]) -> GuidedSteps:
    """The steps of a run to a target. Raises ValueError, naming the input, where there is no such run."""
    require_no_mask("the latent", extra_args.get("denoise_mask"), "a target", ", or use Density Guidance Sampler")
    steps = guided_steps(schedule)
    if steps is None:
        raise ValueError(
            f"sigmas are {brief(schedule.sigmas)}; no step lies between two noise levels above 0: use more steps, or the "
            f"target '{SHIFT}' with value 0"
        )
    if settings.target == SAME and settings.reference_image >= len(x):
        raise ValueError(
            f"reference_image is {settings.reference_image}, and the batch has {len(x)} images: choose 0 "
            f"to {len(x) - 1}, or -1 for the median"
        )
    return steps


def _probing(
    guider: Any, predict: GuiderDenoiser, x: torch.Tensor, schedule: Schedule, settings: TargetSettings, seed: int | None
) -> Callable[[], Evaluate]:
    """new_evaluate of `TrackedRuns` with random probes.

    All images get the same probes: where their Jacobians are alike so are the errors, and their differences small.
    """
    level = middle_level(schedule)
    sigma = schedule.sigmas[0] if level is None else level.sigma
    probe = open_probe(guider, predict, x / schedule.sigmas[0] * sigma, sigma, ((seed or 0) + PROBE_SEED_OFFSET) % 2**64)
    same = [0] * len(x)
    return lambda: probe.model(int(settings.probes), same)


def _log(result: TargetResult, settings: TargetSettings) -> None:
    """The achieved values to the log; a warning for what was not reached."""
    for i, (wanted, got, error) in enumerate(zip(result.target, result.achieved, result.standard_error)):
        text = f"image {i}: {got:.4f} ± {error:.4f} bits per dimension at s = {result.s:.4g}, target {wanted:.4f}"
        if not abs(got - wanted) <= settings.tolerance:  # NaN is not reached either
            logging.warning(
                "Density target not reached in %d passes; nearest: %s. Ask for less, use more steps, or allow more passes.",
                result.reached.passes,
                text,
            )
        elif settings.target == ABSOLUTE and error > UNCERTAIN * settings.tolerance:
            logging.warning(
                "Density target: %s. The number itself is uncertain: the schedule begins where the image still shows "
                "(denoise below 1), or there are few probes. 'shift from the unguided run' does not depend on it.",
                text,
            )
        else:
            logging.info("Density target: %s", text)

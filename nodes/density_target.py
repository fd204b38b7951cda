"""A sampler that ends at a wanted log-density."""

import itertools
import logging
import math
from dataclasses import dataclass

import comfy.samplers
import torch
from comfy_api.latest import io
from tqdm.auto import tqdm

from ..dg_core import divergence
from ..dg_core.schedule import coordinates_of
from ..dg_core.control import guided_range
from ..dg_core.log_density import ProbedModel, bits_of_state, log_start, state_of_bits
from ..dg_core.statistics import compute_dtype
from ..dg_core.target import TrackedRuns, reach
from ..dg_core.units import bits_per_dim_to_nats
from .host.steering import GuidanceSettings, require_one_part, sample_density_guided
from .host.model_access import Predict, derivative_method, network_dtype
from .host.inputs import BITS, CATEGORY, PROBES, Choice, Number, check_fields, schemas

ABSOLUTE, SHIFT, SAME = "bits per dimension", "shift from the unguided run", "same for the whole batch"
INPUTS = (
    Choice(
        "target", "What to reach at the last noise level above 0. 'bits per dimension': value is -log2 p / D itself. 'shift "
        "from the unguided run': value is the change from what the same noise gives without guidance. 'same for the whole "
        "batch': every image gets one value.",
        options=(ABSOLUTE, SHIFT, SAME), default=SHIFT, neutral=f"{SHIFT}, with value 0"),
    Number(
        "value", "The amount of detail; larger means more. Not used for 'same for the whole batch'.",
        unit=BITS, default=0.0, neutral="0, as a shift", low=-20.0, high=20.0, round=0.0001),
    Number(
        "reference_image", "For 'same for the whole batch'. Number of the image, from 0, whose unguided value every image "
        "gets; -1 takes the median of the batch.", default=-1, neutral=-1, low=-1, high=4095),
    Number(
        "tolerance", "A pass that misses by more is followed by another one. The error of the tracked value comes on top; more "
        "probes lower it.", unit=BITS, default=0.002, low=0.0, high=1.0, step=0.001, round=0.00001),
    Number(
        "max_passes", "Number of guided passes at most, after the unguided one. Each is a whole sampling run.",
        default=2, low=1, high=20),
    PROBES,
)
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

    def __post_init__(self):
        check_fields(self, INPUTS)

    @property
    def neutral(self):
        return self.target == SHIFT and self.value == 0

    def target_of(self, unguided, dim, s_end):
        """Wanted log p_u at the end, (B,) in nats, from that of the unguided run."""
        if self.target == SHIFT:
            return unguided + bits_per_dim_to_nats(self.value, dim)
        if self.target == ABSOLUTE:
            return torch.full_like(unguided, state_of_bits(self.value, s_end, dim))
        wanted = unguided.median() if self.reference_image < 0 else unguided[self.reference_image]
        return wanted.expand_as(unguided).clone()


class DensityTargetSampler(io.ComfyNode):
    INPUTS = INPUTS

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DensityTargetSampler",
            display_name="Density Target Sampler",
            category=CATEGORY,
            description="Gives images an exact amount of detail: a number, a change, or the same for a whole batch. Measures "
                        "while it samples, so a run costs several plain ones. A sampler: connect it to SamplerCustomAdvanced.",
            inputs=schemas(cls.INPUTS),
            outputs=[io.Sampler.Output(
                display_name="sampler",
                tooltip="The sampler, for SamplerCustomAdvanced or Density Trace. What it reached is in the log and in the "
                        "trace.")],
        )

    @classmethod
    def execute(cls, target, value, reference_image, tolerance, max_passes, probes):
        settings = TargetSettings(target, value, reference_image, tolerance, max_passes, probes)
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_to_target, {"settings": settings}))


def sample_to_target(model, x, sigmas, extra_args=None, callback=None, disable=None, settings=TargetSettings(), look=None):
    """Explicit control with the signature of the host's sampler functions.

    look: as `look_anew` in `TrackedRuns`, in place of probes.
    """
    extra_args = extra_args or {}
    if settings.neutral:
        return sample_density_guided(model, x, sigmas, extra_args, callback, disable, GuidanceSettings())
    guider = model.inner_model
    coordinates = coordinates_of(guider.inner_model.model_sampling)
    guided_range(sigmas.tolist(), coordinates)  # refuses a schedule that ascends, but for a rounding
    schedule = _descending(sigmas.tolist())
    guided = guided_range(schedule, coordinates)
    _check(settings, guided, x, extra_args)
    require_one_part(guider)
    trace = extra_args.get("model_options", {}).get("density_trace")
    if trace is not None:
        trace.tracks_itself = True
    steps, dim, dtype = len(sigmas) - 1, x[0].numel(), x.dtype
    with torch.inference_mode(False), torch.no_grad(), tqdm(total=steps, disable=disable) as bar:
        x = x.to(compute_dtype(dtype), copy=True)
        predict = Predict(guider, extra_args, len(x))
        look = look or _probing(guider, predict, coordinates, x, schedule, settings, extra_args.get("seed"))
        sigma = schedule[0]
        start = log_start(predict, x, sigma, coordinates.alpha(sigma), look()(x, sigma, 0))

        def step_done(done, x, denoised):
            step = min(steps - 1, int(done * steps / ((1 + settings.max_passes) * len(schedule))))
            bar.update(step + 1 - bar.n)
            if callback is not None:
                callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": denoised})

        runs = TrackedRuns(look, x, schedule, coordinates, guided, start, step_done)
        reached = reach(runs, lambda unguided: settings.target_of(unguided, dim, runs.s_end),
                        -bits_per_dim_to_nats(settings.tolerance, dim), settings.max_passes)
        bar.update(steps - bar.n)
        _tell(reached, settings, dim, runs.s_end, trace)
        return reached.x.to(dtype)


def _descending(sigmas):
    """A schedule without repeats and without what rises by a rounding: a track has no use for two looks at one level."""
    return list(dict.fromkeys(itertools.accumulate(sigmas, min)))


def _check(settings, guided, x, extra_args):
    if extra_args.get("denoise_mask") is not None:
        raise ValueError("the latent has a noise mask; a target is a density of the whole image: remove the mask, or use "
                         "DensityGuidanceSampler")
    if guided.log_range == 0:
        raise ValueError("sigmas have no step between two noise levels above 0 that could be guided; use a longer "
                         "schedule, or target 'shift from the unguided run' with value 0")
    if settings.target == SAME and settings.reference_image >= len(x):
        raise ValueError(f"reference_image is {settings.reference_image}, and the batch has {len(x)} images: choose 0 "
                         f"to {len(x) - 1}, or -1 for the median")


def _probing(guider, predict, coordinates, x, schedule, settings, seed):
    """look_anew with Rademacher probes, by the derivative that works on this network.

    All images get the same probes: where their Jacobians are alike so are the errors, and their differences small.
    """
    seed = ((seed or 0) + PROBE_SEED_OFFSET) % 2**64
    sigma = next(v for v in schedule[len(schedule) // 2:] + schedule[::-1] if v > 0 and coordinates.alpha(v) > 0)
    dtype = network_dtype(guider.inner_model)

    method, _ = derivative_method(
        guider, predict, x / schedule[0] * sigma, divergence.rademacher(x, seed, -1), sigma, dtype)
    same = [0] * len(x)
    return lambda: ProbedModel(predict, coordinates, method, dtype, seed, int(settings.probes), same)


def _tell(reached, settings, dim, s_end, trace):
    """The achieved values to the log, and to a trace if there is one; a warning for what was not reached."""
    to_bits = lambda log_p_u: bits_of_state(log_p_u, s_end, dim).tolist()
    target, achieved, unguided = to_bits(reached.target), to_bits(reached.achieved), to_bits(reached.unguided)
    errors = (reached.standard_error / (dim * math.log(2))).tolist()
    if trace is not None:
        trace.target = {"target": target, "achieved": achieved, "standard_error": errors, "unguided": unguided,
                        "s": s_end, "passes": reached.passes}
        trace.last = reached.last
    for i, (wanted, got, error) in enumerate(zip(target, achieved, errors)):
        text = f"image {i}: {got:.4f} ± {error:.4f} bits per dimension at s = {s_end:.4g}, target {wanted:.4f}"
        if not abs(got - wanted) <= settings.tolerance:  # NaN is not reached either
            logging.warning("Density target not reached in %d passes; %s. That is the nearest that was: ask for less, "
                            "guide a longer schedule, or allow more passes.", reached.passes, text)
        elif settings.target == ABSOLUTE and error > UNCERTAIN * settings.tolerance:
            logging.warning("Density target: %s. The number itself is uncertain: the schedule begins where the image still shows "
                            "(denoise below 1), or few probes read it. 'shift from the unguided run' does not need it.", text)
        else:
            logging.info("Density target: %s", text)

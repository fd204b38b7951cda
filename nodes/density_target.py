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
from ..dg_core.units import bits_per_dim_to_nats, require_number, require_whole
from .host.steering import GuidanceSettings, require_one_part, sample_density_guided
from .host.model_access import Predict, derivative_method, network_dtype
from .host.inputs import CATEGORY, PROBES

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

    def __post_init__(self):
        if self.target not in (ABSOLUTE, SHIFT, SAME):
            raise ValueError(f"target is {self.target!r}; it must be one of: {ABSOLUTE}, {SHIFT}, {SAME}")
        require_number("value", self.value, -20.0, 20.0)
        require_number("tolerance", self.tolerance, 0.0, 1.0)
        require_whole("max_passes", self.max_passes, *MAX_PASSES)
        require_whole("probes", self.probes, *PROBES)
        require_whole("reference_image", self.reference_image, *REFERENCE_IMAGES)

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

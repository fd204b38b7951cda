"""Score alignment of a guider's model: its inputs, and the runs that it takes."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ...dg_core import alignment, divergence
from ...dg_core.levels import noise_levels, snapped
from ...dg_core.schedule import NoisePath, Schedule, brief, log_snr
from .advice import adds_noise, name_of
from .inputs import (
    DETAIL_SHIFT,
    END_PERCENT,
    PROBES,
    Choice,
    Number,
    Seed,
    Socket,
    batch_index_of,
    check_fields,
    defaults,
    require_no_mask,
    samples_of,
    sigmas_of,
)
from .model_access import GuiderModel, Probe, check_latent, open_probe, path_of, run_in_guider, training_table
from .steering import GuidanceSettings, solver_sampler
from .wrappers import outermost, without_guidance

WITH_SCORE, WITHOUT_SCORE, BOTH, FINITE_SCALE = "with score", "without score", "both", "finite scale"
ENOUGH_STEPS = 30
FAR = 2.0  # times the noise level of end_percent: alignment is not read there
GUIDER = Socket(
    "guider", "Model, prompt and CFG, as for SamplerCustomAdvanced. Patches count; density guidance does not.", io.Guider
)
NOISE = Socket("noise", "The starting noise whose scaling is checked, for instance of RandomNoise.", io.Noise)
SAMPLER = Socket("sampler", "Only for finite scale: any sampler.", io.Sampler, unlinked="the pack's own solver")
INPUTS = (
    GUIDER,
    NOISE,
    Socket("latent_image", "The empty latent, which sets size and number of images; without a noise mask.", io.Latent),
    Socket(
        "sigmas",
        f"The schedule of noise levels sigma, from the model's maximum down; {ENOUGH_STEPS} steps are usually "
        "enough. The node places the levels between its ends where the density changes; finite scale keeps "
        "those of the schedule.",
        io.Sigmas,
    ),
    Choice(
        "method",
        "How scaling is checked. with score: follows the change along the run, about 3 model calls per step. "
        "without score: about 5, with random probes. both: compares the two. finite scale: a finite difference of two whole "
        "runs, with slightly less and slightly more noise; takes any sampler.",
        options=(WITH_SCORE, WITHOUT_SCORE, BOTH, FINITE_SCALE),
        default=WITH_SCORE,
        neutral=WITH_SCORE,
    ),
    replace(
        END_PERCENT,
        low=0.05,
        default=0.95,
        neutral=None,
        text="Alignment is read here, because near zero noise the score is unreliable; the image is finished all the "
        "same. 1 reads at the last sigma above 0.",
    ),
    replace(
        PROBES,
        text="Number of random probes per step, for without score. The error falls with the square root of their number; "
        "each costs 4 model calls.",
    ),
    Seed("seed", "Seed of the probes only; the noise has a seed of its own."),
    replace(
        DETAIL_SHIFT,
        default=0.02,
        step=0.01,
        round=0.0001,
        optional=True,
        text="The change of detail that the output scale should make; positive adds detail. Holds up to about 0.1.",
    ),
    Number(
        "scale_step",
        "For finite scale: the step h of the finite difference; compares the noise times 1 - h with 1 + h. Smaller is closer "
        "to the derivative, until rounding takes over: use 0.05 in float16 and bfloat16.",
        symbol="h",
        default=0.01,
        low=0.0001,
        high=0.2,
        step=0.001,
        round=0.0001,
        optional=True,
    ),
    SAMPLER,
)
_DEFAULT = defaults(INPUTS)


@dataclass(frozen=True)
class CheckSettings:
    """The node's numbers. Raises ValueError, naming the input, where one is out of range."""

    method: str = _DEFAULT["method"]
    end_percent: float = _DEFAULT["end_percent"]
    probes: int = _DEFAULT["probes"]
    seed: int = _DEFAULT["seed"]
    detail_shift: float = _DEFAULT["detail_shift"]
    scale_step: float = _DEFAULT["scale_step"]

    def __post_init__(self) -> None:
        check_fields(self, INPUTS)


@dataclass(frozen=True)
class Check:
    """What came out: N noise levels, B images, on the CPU."""

    samples: torch.Tensor  # the finished latent, in the host's units
    sigmas: list[float]  # (N,)
    log_snr: list[float]  # (N,)
    cosines: dict[str, torch.Tensor]  # way -> (N, B)
    alignment: torch.Tensor  # (B,), nats per unit of ln(1 / noise scale), at the last level
    calls: int  # model calls for each image, without `divergence.TRIAL_CALLS`
    dual_calls: int  # those of them in forward-mode AD
    plain_calls: int  # that sampling alone takes
    steps: int
    derivatives: str  # how they were taken
    stochastic: str = ""  # name of the sampler, where it adds noise of its own

    @property
    def final_cosine(self) -> torch.Tensor:
        """Smallest over the ways, (B,)."""
        return torch.stack([c[-1] for c in self.cosines.values()]).amin(0)

    @property
    def aligned(self) -> bool:
        """Whether scaling works for every image."""
        return bool((self.final_cosine > 0).all())

    @property
    def dim(self) -> int:
        """Number of elements of one image."""
        return self.samples[0].numel()

    @property
    def response(self) -> torch.Tensor:
        """Predicted change in bits per dimension for 1% more noise, (B,)."""
        return alignment.percent_response(self.alignment, self.dim)

    def scales(self, detail_shift: float) -> torch.Tensor:
        """The noise scale of each image that makes detail_shift, (B,): see `alignment.scale_for_shift`."""
        return alignment.scale_for_shift(detail_shift, self.alignment, self.dim)

    def common_scale(self, detail_shift: float) -> float:
        """The mean of `scales`; 1 if an image is not aligned or its scale is at a limit, where detail_shift is not reached."""
        scales, (low, high) = self.scales(detail_shift), alignment.SCALE_RANGE
        reached = self.aligned and bool(((scales > low) & (scales < high)).all())
        return float(scales.mean()) if reached else 1.0


def examine(
    guider: Any, noise: Any, latent: dict[str, Any], sigmas: torch.Tensor, settings: CheckSettings, sampler: Any = None
) -> Check:
    """The `Check` of a GUIDER, NOISE, LATENT and SIGMAS of the host.

    sampler: a SAMPLER, of the finite scale method alone. Raises ValueError, naming the input, before any model call.
    """
    SAMPLER.check(sampler)
    run = _Run.prepare(guider, noise, latent, sigmas, settings)
    return run.finite_scale(sampler) if settings.method == FINITE_SCALE else run.derivatives()


@dataclass(frozen=True)
class _Run:
    guider: Any
    samples: torch.Tensor
    noise: torch.Tensor
    noise_seed: int
    indices: list[int] | None
    sigmas: list[float]  # strictly descending floats
    stop: int
    path: NoisePath
    settings: CheckSettings

    @classmethod
    def prepare(cls, guider: Any, noise: Any, latent: dict[str, Any], sigmas: torch.Tensor, settings: CheckSettings) -> "_Run":
        """Raises ValueError, before any model call, where an input does not fit."""
        GUIDER.check(guider)
        NOISE.check(noise)
        samples = samples_of("latent_image", latent)
        require_no_mask("latent_image", latent.get("noise_mask"), "score alignment")
        patcher = guider.model_patcher
        samples = comfy.sample.fix_empty_latent_channels(patcher, samples, **_sizes(latent))
        check_latent(patcher, samples, empty_allowed=True)
        model_sampling = patcher.get_model_object("model_sampling")
        path = path_of(model_sampling)
        schedule, stop = _schedule(sigmas, model_sampling, settings.end_percent)
        indices = batch_index_of("latent_image", latent, len(samples))
        unit = noise.generate_noise({**latent, "samples": samples})
        if not unit.isfinite().all():
            raise ValueError("noise has elements that are NaN or infinite; connect RandomNoise")
        if not unit.flatten(1).any(1).all():
            raise ValueError("noise is zero, as DisableNoise gives it; there is nothing to scale: connect RandomNoise")
        return cls(guider, samples, unit, noise.seed, indices, schedule, stop, path, settings)

    def derivatives(self) -> Check:
        """`Check` by directional derivatives along one run."""
        wanted = self.settings.method
        probes = 0 if wanted == WITH_SCORE else self.settings.probes
        sigmas, stop = self._placed()
        evaluations, rest = stop + 1, sum(v > 0 for v in sigmas[stop + 1 :])

        def calls(method: str) -> int:
            each = divergence.trace_calls(method, probes) if probes else divergence.derivative_calls(method)
            return evaluations * each + rest

        def work(model: GuiderModel) -> tuple[torch.Tensor, alignment.Profile, Probe]:
            probe = self._open_probe(model)
            model.expect(divergence.TRIAL_CALLS + calls(probe.method))
            differentiate = alignment.Differentiate(
                model.predict, probe.method, probe.dtype, probes, self.settings.seed, self.indices
            )
            samples, profile = alignment.trace_alignment(
                differentiate, model.predict, *self._start(model), Schedule(model.path, sigmas), stop
            )
            end = torch.tensor(self.sigmas[-1]).to(samples)
            return model.model_sampling.inverse_noise_scaling(end, samples), profile, probe

        samples, profile, probe = run_in_guider(
            self.guider,
            self.samples,
            work,
            divergence.TRIAL_CALLS + calls(divergence.DIFFERENCES),
            sigmas,
            self.noise_seed,
            self.noise,
        )
        amounts = {WITH_SCORE: profile.alignment}
        if probes:
            amounts[WITHOUT_SCORE] = profile.alignment_without_score
        amounts = amounts if wanted == BOTH else {wanted: amounts[wanted]}
        forward = evaluations * divergence.trace_calls(probe.method, probes) if probe.method == divergence.FORWARD else 0
        return Check(
            self._finished(samples),
            sigmas[: stop + 1],
            profile.log_snr,
            {way: amount / profile.norms for way, amount in amounts.items()},
            next(iter(amounts.values()))[-1],
            calls(probe.method),
            forward,
            len(sigmas) - 1,
            len(sigmas) - 1,
            probe.reason,
        )

    def _placed(self) -> tuple[list[float], int]:
        """(sigmas, stop): the schedule with as many noise levels down to `stop`, but placed where derivatives want them."""
        first, last = (self.path.s(self.sigmas[i]) for i in (0, self.stop))
        levels = noise_levels(last, first, self.stop + 1, self.samples[0].numel())
        nodes = [self.path.sigma(s) for s in reversed(levels)]
        table = training_table(self.guider.model_patcher.get_model_object("model_sampling"))
        if table is not None:
            nodes = snapped(nodes, table)
        nodes = [self.sigmas[0], *nodes[1:-1], self.sigmas[self.stop]]
        return nodes + self.sigmas[self.stop + 1 :], len(nodes) - 1

    def finite_scale(self, sampler: Any) -> Check:
        """`Check` by ordinary runs with scaled noise."""
        sampler = solver_sampler(GuidanceSettings()) if sampler is None else sampler
        h, sigma = self.settings.scale_step, self.sigmas[self.stop]
        whole = len(self.sigmas) - 1
        runs = [(_Scaled(sampler, scale), steps) for scale, steps in ((1 - h, self.stop), (1 + h, self.stop), (1.0, whole))]
        less, more, finished = (self._sample(scaled, steps) for scaled, steps in runs)
        level = self.path.at(sigma)

        def score(model: GuiderModel) -> torch.Tensor:
            x = level.alpha * model.x
            return -level.eps(x, model.predict(x, sigma)) / level.s

        # The host's samplers return y = x / alpha.
        grad = run_in_guider(self.guider, (less + more) / 2, score, 1, [sigma], self.noise_seed)
        inside = self.guider.model_patcher.model.process_latent_in
        amount, cosine = (
            v.cpu().double() for v in alignment.finite_alignment(inside(less).to(grad), inside(more).to(grad), grad, h)
        )
        calls = sum(scaled.calls for scaled, _ in runs) + 1
        return Check(
            finished,
            [sigma],
            [log_snr(level.s)],
            {FINITE_SCALE: cosine[None]},
            amount,
            calls,
            0,
            runs[-1][0].calls,
            whole,
            f"none: runs with the noise times {1 - h:g} and {1 + h:g}",
            (name_of(sampler) or "this sampler") if adds_noise(sampler) else "",
        )

    def _start(self, model: GuiderModel) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, tangent) at the first noise level; the tangent is what less noise changes, without the latent's part."""
        sigma = torch.tensor(self.sigmas[0]).to(model.noise)

        def begin(noise: torch.Tensor) -> torch.Tensor:
            return model.model_sampling.noise_scaling(sigma, noise, model.x, True)

        x = begin(model.noise.clone())  # some of the host's samplings write into it
        return x, begin(torch.zeros_like(x)) - x

    def _open_probe(self, model: GuiderModel) -> Probe:
        """`open_probe` at the second noise level, where every model depends on x."""
        sigma = self.sigmas[1]
        x = model.model_sampling.noise_scaling(torch.tensor(sigma).to(model.noise), model.noise.clone(), model.x, False)
        return open_probe(self.guider, model.predict, x, sigma, direction=x.clone())

    def _sample(self, sampler: Any, steps: int) -> torch.Tensor:
        callback = latent_preview.prepare_callback(self.guider.model_patcher, steps)
        return self.guider.sample(
            self.noise,
            self.samples,
            sampler,
            torch.tensor(self.sigmas[: steps + 1]),
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=self.noise_seed,
        ).cpu()

    def _finished(self, samples: torch.Tensor) -> torch.Tensor:
        return self.guider.model_patcher.model.process_latent_out(samples.to(torch.float32)).cpu()


class _Scaled(comfy.samplers.Sampler):
    """A sampler that begins with its noise times a number, after every patch of the noise, and without this pack's density
    guidance; counts the predictions that it asks for."""

    def __init__(self, sampler: Any, scale: float):
        self.sampler, self.calls = sampler, 0
        self._scale = scale

    def sample(
        self,
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the host's `Sampler.sample`."""
        armed = guider.model_options
        guider.model_options = outermost(
            without_guidance(armed), comfy.patcher_extension.WrappersMP.PREDICT_NOISE, self._count, "calls"
        )
        try:
            return self.sampler.sample(guider, sigmas, extra_args, callback, noise * self._scale, *args, **kwargs)
        finally:
            guider.model_options = armed

    def _count(self, executor: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return executor(*args, **kwargs)


SIZES = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # of an empty LATENT, in newer hosts, which fit it to the model


def _sizes(latent: dict[str, Any]) -> dict[str, Any]:
    """Those of `SIZES` that the latent has and the host takes."""
    taken = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    return {name: latent[name] for name in SIZES if name in latent and name in taken}


def finished_latent(latent: dict[str, Any], samples: torch.Tensor) -> dict[str, Any]:
    """The LATENT of a finished run that began with `latent`, whose size is fitted already, as the host's samplers return it."""
    return {**{name: value for name, value in latent.items() if name not in SIZES}, "samples": samples}


def _schedule(sigmas: torch.Tensor, model_sampling: Any, end_percent: float) -> tuple[list[float], int]:
    """(strictly descending floats, index of the last one that is at or above the level of end_percent).

    Raises ValueError, naming the input, for a schedule that score alignment cannot follow.
    """
    values = sigmas_of(sigmas)
    shown = brief(values)
    if not all(math.isfinite(v) and v >= 0 for v in values) or any(b > a for a, b in zip(values, values[1:])):
        raise ValueError(f"sigmas are {shown}; they must be finite, not negative, and descend")
    values = [v for i, v in enumerate(values) if not i or v < values[i - 1]]
    if sum(v > 0 for v in values) < 3:
        raise ValueError(
            f"sigmas are {shown}; score alignment needs at least three different noise levels above 0, "
            f"so three steps; {ENOUGH_STEPS} are usually enough"
        )
    highest = float(model_sampling.sigma_max)
    if not math.isclose(highest, values[0], rel_tol=1e-5):
        advice = (
            "use denoise 1, and a scheduler that begins at the maximum (not ddim_uniform or the optimal steps)"
            if values[0] < highest
            else "take sigmas that a scheduler made for this model"
        )
        raise ValueError(
            f"sigmas begin at {values[0]:.6g} and the model's maximum is {highest:.6g}; scaling the noise needs "
            f"a run that starts from pure noise: {advice}"
        )
    level = float(model_sampling.percent_to_sigma(end_percent)) * (1 - 1e-6)
    stop = max(i for i, v in enumerate(values) if i == 0 or (v >= level and v > 0))
    if stop and level > 0 and values[stop] > FAR * level and values[stop + 1 :]:  # one step leads far beyond
        values.insert(stop + 1, level)
        stop += 1
    if stop < 2:
        raise ValueError(
            f"end_percent is {end_percent}; it leaves {stop + 1} of the noise levels {shown}, and at least "
            "three are needed: use a larger end_percent or more steps"
        )
    return values, stop

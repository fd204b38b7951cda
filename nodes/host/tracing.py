"""A sampler whose log-density is recorded on the way."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import numpy as np
import torch

from ...dg_core.log_density import Evaluate, LogDensityTrack, bits_of_state, log_start
from ...dg_core.record import RunRecord
from ...dg_core.schedule import NoisePath, Schedule
from ...dg_core.statistics import compute_dtype
from ...dg_core.target import Run
from ...dg_core.units import error_bits_per_dim
from .advice import function_of, innermost
from .inputs import parts_refusal, require_no_mask, samples_of
from .model_access import GuiderDenoiser, middle_level, open_probe, path_of
from .plots import blank_image, curves_image
from .steering import sample_density_guided
from .target_run import TargetResult, TargetSampler
from .wrappers import WRAPPER_KEY, outermost

PROBE_SEED_OFFSET = 0x3C6EF372FE94F82B
OWN_LEVELS = {"dpm_fast_function": "dpm_fast", "dpm_adaptive_function": "dpm_adaptive"}  # function: the host's name


def trace(
    noise: Any, guider: Any, sampler: Any, sigmas: torch.Tensor, latent_image: dict[str, Any], exact: bool
) -> tuple[dict[str, Any], dict[str, Any], torch.Tensor, str]:
    """(output, denoised output, plot as an IMAGE, record as JSON) of a run of the host's SamplerCustomAdvanced.

    exact: whether to track the log-density too. Raises ValueError, naming the input, before any model call.
    """
    # A V3 node in newer hosts only.
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced as node

    require_traceable(sampler, latent_image)
    traced = TracedSampler(sampler, exact)
    inputs = noise, guider, traced, sigmas, latent_image
    output, denoised = node.execute(*inputs).result if hasattr(node, "execute") else node().sample(*inputs)
    record = json.dumps(_without_nan(traced.record), indent=1, allow_nan=False)
    return output, denoised, plot_of(traced.record["rows"]), record


def _without_nan(value: Any) -> Any:
    """A record with None in place of numbers that JSON does not have: NaN and infinity."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_traceable(sampler: Any, latent_image: dict[str, Any]) -> None:
    """Raise ValueError where the whole image has no single density at the noise levels of the schedule."""
    require_no_mask("latent_image", latent_image.get("noise_mask"), "the trace", ", or sample with SamplerCustomAdvanced")
    if getattr(samples_of("latent_image", latent_image), "is_nested", False):
        raise parts_refusal("latent_image", "sample with SamplerCustomAdvanced")
    name = getattr(function_of(sampler), "__name__", "")
    if name in OWN_LEVELS:
        raise ValueError(
            f"sampler is {OWN_LEVELS[name]}, which calls the model at noise levels of its own and not at those "
            "of sigmas: choose another sampler, for instance euler or dpmpp_2m"
        )


class _Witness:
    """PREDICT_NOISE wrapper, inside this pack's guidance: what the sampler's last call was about.

    Some samplers report another state than the one of the prediction: the first (ipndm, deis) or the next (uni_pc).
    """

    def __init__(self) -> None:
        self.last: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # x, denoised, sigma

    def __call__(
        self, executor: Callable[..., torch.Tensor], x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        denoised = executor(x, sigma, *args, **kwargs)
        self.last = x, denoised, sigma
        return denoised

    def armed(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """Copy of `model_options` with this wrapper."""
        kind = comfy.patcher_extension.WrappersMP.PREDICT_NOISE
        options = outermost(model_options, kind, self)
        own = options["transformer_options"]["wrappers"][kind][WRAPPER_KEY]
        own.append(own.pop(0))
        return options


class TracedSampler(comfy.samplers.Sampler):
    """Any sampler, with its steps recorded through the callback; `record` is there afterwards."""

    def __init__(self, sampler: comfy.samplers.Sampler, exact: bool):
        self._sampler, self._exact = sampler, exact
        self.record: dict[str, Any] = {"rows": []}

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
        inner = innermost(self._sampler)
        if isinstance(inner, TargetSampler) and not inner.settings.neutral:  # It tracks itself.
            return _reporting(self._sampler, self._report).sample(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
        path, schedule = path_of(guider.inner_model.model_sampling), sigmas.tolist()
        free = RunRecord(path, noise[0].numel())
        tracked = _Tracked.of_run(guider, extra_args, Schedule(path, schedule), noise) if self._exact else None
        # The pack's own solver corrects a state after the call, and reports the better one.
        witness = None if function_of(inner) is sample_density_guided else _Witness()
        steps: list[int] = []
        called: list[torch.Tensor] = []

        def step(i: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            if callback is not None:
                callback(i, denoised, x, total)
            if i >= len(schedule) or not 0 < schedule[i] < min(free.sigmas, default=math.inf):
                return
            if witness is not None:
                if witness.last is None:  # a report before the first call
                    return
                x, denoised, sigma = witness.last
                called.append(sigma[0])
            steps.append(i)
            wide = compute_dtype(x.dtype)
            free.add(x.to(wide), denoised.to(wide), schedule[i])
            if tracked is not None:
                tracked.add(x, schedule[i])

        armed = guider.model_options
        if witness is not None:
            guider.model_options = witness.armed(armed)
        try:
            result = self._sampler.sample(guider, sigmas, extra_args, step, noise, *args, **kwargs)
        finally:
            guider.model_options = armed
        if called and not np.allclose(torch.stack(called).tolist(), free.sigmas, rtol=1e-3):
            self.record = {
                "rows": [],
                "note": "this sampler calls the model at noise levels of its own, not at those of sigmas: nothing is recorded",
            }
        else:
            exact = [{}] * len(steps) if tracked is None else tracked.rows()
            self.record = {"rows": [{**row, "step": i, **more} for i, row, more in zip(steps, free.rows(), exact)]}
        return result

    def _report(self, result: TargetResult) -> None:
        self.record = {
            "target": {
                "target": result.target,
                "achieved": result.achieved,
                "standard_error": result.standard_error,
                "unguided": result.unguided,
                "s": result.s,
                "passes": result.reached.passes,
            },
            "rows": target_rows(result.reached.last),
        }


def _reporting(sampler: Any, report: Callable[[TargetResult], None]) -> Any:
    """A copy of a `TargetSampler`, guided or not, that gives its result to report."""
    if isinstance(sampler, TargetSampler):
        return TargetSampler(sampler.settings, report, sampler.new_evaluate)
    outer = copy.copy(sampler)
    outer.sampler = _reporting(sampler.sampler, report)
    return outer


class _Tracked:
    """The log-density of the states, by one probe at each."""

    def __init__(self, predict: GuiderDenoiser, evaluate: Evaluate, path: NoisePath, dim: int):
        self._predict, self._evaluate, self._path = predict, evaluate, path
        self._track = LogDensityTrack(path, dim)
        self._start: tuple[torch.Tensor, torch.Tensor] | None = None
        self._log_prob: list[tuple[torch.Tensor, torch.Tensor]] = []

    @classmethod
    def of_run(cls, guider: Any, extra_args: dict[str, Any], schedule: Schedule, noise: torch.Tensor) -> "_Tracked | None":
        """None where the schedule has no noise level with a density."""
        level = middle_level(schedule)
        if level is None:
            return None
        seed = ((extra_args.get("seed") or 0) + PROBE_SEED_OFFSET) % 2**64
        with torch.inference_mode(False), torch.no_grad():
            predict = GuiderDenoiser(guider, extra_args, len(noise))
            x = level.std * noise.to(compute_dtype(noise.dtype), copy=True)
            probe = open_probe(guider, predict, x, level.sigma, seed)
        return cls(predict, probe.model(), schedule.path, noise[0].numel())

    def add(self, x: torch.Tensor, sigma: float) -> None:
        """Evaluate the state x (B, ...) at sigma."""
        with torch.inference_mode(False), torch.no_grad():
            x = x.to(compute_dtype(x.dtype), copy=True)
            evaluation = self._evaluate(x, sigma, len(self._track.s))
            if self._start is None:
                self._start = log_start(self._predict, x, self._path.at(sigma), evaluation)
            start, error = self._start
            self._track.add(x, sigma, evaluation)
            self._log_prob.append((start + self._track.change, (self._track.error**2 + error**2).sqrt()))

    def rows(self) -> list[dict[str, list[float]]]:
        """bits_per_dim and standard_error of every step, lists over the images; nothing where s is infinite."""
        return [density_row(log_p_u, s, self._track.dim, error) for s, (log_p_u, error) in zip(self._track.s, self._log_prob)]


def density_row(log_p_u: torch.Tensor, s: float, dim: int, error: torch.Tensor | None = None) -> dict[str, list[float]]:
    """bits_per_dim and standard_error (where there is an error) of log_p_u (B,) in nats at s; {} where s is infinite."""
    if not math.isfinite(s):
        return {}
    row = {"bits_per_dim": bits_of_state(log_p_u, s, dim).tolist()}
    return row if error is None else {**row, "standard_error": error_bits_per_dim(error, dim).tolist()}


def target_rows(run: Run) -> list[dict[str, Any]]:
    """The rows of the last pass to a target."""
    track = run.track
    return [
        {
            "step": i,
            "sigma": sigma,
            "s": s if math.isfinite(s) else None,
            "eps_energy": energy.tolist(),
            **density_row(log_p_u, s, track.dim),
        }
        for i, (sigma, (s, log_p_u), energy) in enumerate(zip(track.sigmas, run.log_prob.items(), track.eps_energy))
    ]


_CURVES = {
    "eps_energy": "||eps||² / D",
    "eta": "eta",
    "shift": "shift, bits/dim",
    "free_bits_per_dim": "free bits/dim",
    "bits_per_dim": "bits/dim",
}


def plot_of(rows: list[dict[str, Any]]) -> torch.Tensor:
    """The curves of a record against log-SNR, those that it has; a blank image without rows."""
    rows = [row for row in rows if row["s"] is not None]
    if not rows:
        return blank_image()
    images = len(rows[0]["eps_energy"])
    panels = {
        label: np.array([row.get(key, [np.nan] * images) for row in rows])
        for key, label in _CURVES.items()
        if any(key in row for row in rows)
    }
    return curves_image(
        panels, "log-SNR, -2 ln s", [-2 * math.log(row["s"]) for row in rows], [f"image {i}" for i in range(images)]
    )

"""Readout of the log-density of latents under a guider's model: its inputs, and the work."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from ...dg_core import divergence
from ...dg_core.levels import noise_levels, snapped
from ...dg_core.log_density import Readout, read_log_density, rounding_cost
from .inputs import PROBES, Number, Seed, Socket, batch_index_of, samples_of
from .model_access import GuiderModel, Probe, check_latent, open_probe, path_of, run_in_guider, training_table
from .plots import curves_image

ENOUGH_LEVELS = 16  # below, the error of the steps is more than that of one probe
SHOWN = 1e-4  # relative rounding of the noise levels that the widget and the error show
GUIDER = Socket(
    "guider",
    "The model with its prompt and CFG, from BasicGuider or CFGGuider. Patches and prompt count; density guidance "
    "does not. With a CFG above 1 compare only numbers of the same settings.",
    io.Guider,
)
STEPS = Number(
    "steps",
    f"Number of noise levels N at which the model is evaluated. From {ENOUGH_LEVELS} on the error falls with the "
    "square root of N; below it grows fast.",
    default=32,
    low=2,
    high=1000,
)
NOISE_FLOOR = Number(
    "noise_floor",
    "Noise level s = sigma / alpha at which the density is read; at 0 images have no density. No noise is added. Must "
    "lie in the model's range.",
    default=0.05,
    low=0.0001,
    high=100.0,
    round=0.0001,
)
SEED = Seed("seed", "Seed of the probes. Changing it changes the estimate slightly.")
INPUTS = (
    GUIDER,
    Socket("latent", "The images to read, from VAEEncode or a sampler. A mask is ignored.", io.Latent),
    STEPS,
    PROBES,
    SEED,
    NOISE_FLOOR,
)


def log_density(
    guider: Any, latent: dict[str, Any], steps: int, probes: int, seed: int, noise_floor: float
) -> tuple[list[float], str, torch.Tensor]:
    """(bits per dimension of every image, report, plot as an IMAGE) of a LATENT: what the node Log-Density gives."""
    steps, probes, seed = STEPS.check(steps), PROBES.check(probes), SEED.check(seed)
    samples = samples_of("latent", latent)
    levels = levels_of(guider, samples, noise_floor, steps)
    readout, how = read(guider, samples, levels, probes, seed, batch_index_of("latent", latent, len(samples)))
    report = report_of(readout, [*how, f"steps {steps}, probes {probes}, seed {seed}, noise floor {levels[0]:.4g}"])
    return readout.bits_per_dim.tolist(), report, plot_of(readout)


def levels_of(guider: Any, samples: torch.Tensor, noise_floor: float, steps: int) -> list[float]:
    """The noise levels s of a readout, ascending from `noise_floor`; raises ValueError before any model call."""
    patcher = GUIDER.check(guider).model_patcher
    check_latent(patcher, samples)
    sampling = patcher.get_model_object("model_sampling")
    path = path_of(sampling)
    s_min, s_max = path.s(float(sampling.sigma_min)), path.s(float(sampling.sigma_max))
    floor = NOISE_FLOOR.check(noise_floor)
    if not s_min * (1 - SHOWN) <= floor < s_max * (1 - SHOWN):
        raise ValueError(
            f"noise_floor is {noise_floor}; this model knows noise levels s = sigma / alpha from {s_min:.4g} to {s_max:.4g}: "
            "choose one in between, near the lower end for images"
        )
    levels = noise_levels(max(floor, s_min), s_max, max(2, steps - math.isfinite(s_max)), samples[0].numel())
    table = training_table(sampling)
    return levels if table is None else snapped(levels, table)


def read(
    guider: Any, samples: torch.Tensor, levels: list[float], probes: int, seed: int, indices: Sequence[int] | None = None
) -> tuple[Readout, list[str]]:
    """(`Readout` of the latent `samples`, sentences on how it was computed); everything runs inside the guider.

    indices: a number for each image, with which its probes are drawn; None: its place in the batch.
    """

    def work(model: GuiderModel) -> tuple[Readout, list[str]]:
        sigma, x = in_the_middle(model, levels, seed)
        probe = open_probe(guider, model.predict, x, sigma, seed)
        model.expect(calls(probe.method, probe.dtype))
        readout = read_log_density(probe.model(probes, indices), model.predict, model.x, levels, model.path)
        return readout, [f"divergence by {probe.reason}", precision(probe, sigma, x, levels)]

    def calls(method: str, dtype: torch.dtype = torch.float32) -> int:
        finite = sum(map(math.isfinite, levels))
        top = 1  # the evaluation at pure noise, or else the prior's opposite state
        rounding = 2 if rounds(dtype) else 0
        return (finite * probes + rounding) * divergence.derivative_calls(method) + top + divergence.TRIAL_CALLS

    path = path_of(guider.model_patcher.get_model_object("model_sampling"))
    sigmas = [path.sigma(s) for s in reversed(levels)]
    return run_in_guider(guider, samples, work, calls(divergence.FORWARD), sigmas, seed)


def in_the_middle(model: GuiderModel, levels: list[float], seed: int) -> tuple[float, torch.Tensor]:
    """(sigma, x): a noise level in the middle, and the latent with noise of it, in the host's units."""
    middle = math.sqrt(levels[0] * min(levels[-1], 100.0))
    # One of the levels: patches that read the schedule know no other.
    s = min((s for s in levels if math.isfinite(s)), key=lambda s: abs(math.log(s / middle)))
    level = model.path.at(model.path.sigma(s))
    return level.sigma, level.alpha * model.x + level.std * divergence.rademacher(model.x, seed, -2)


def rounds(dtype: torch.dtype) -> bool:
    """Whether a network's dtype is coarser than float32."""
    return torch.finfo(dtype).eps > torch.finfo(torch.float32).eps


def precision(probe: Probe, sigma: float, x: torch.Tensor, levels: list[float]) -> str:
    """A sentence on what rounding in the network costs, which is measured at x (B, ...) where it is coarser than float32."""
    name = str(probe.dtype).removeprefix("torch.")
    if not rounds(probe.dtype):
        return f"the network computes in {name}"
    dithered = x * (1 + torch.finfo(probe.dtype).eps / 2 * divergence.rademacher(x, probe.seed, -3))
    one, other = (probe.model()(state, sigma, 0).trace for state in (x, dithered))
    cost = rounding_cost(one, other, levels, x[0].numel())
    return f"the network computes in {name}, which costs at least {cost:.1g} bits per dimension against float32"


def report_of(readout: Readout, lines: list[str]) -> str:
    """Values, errors and settings as text."""
    bits, errors = readout.bits_per_dim.tolist(), readout.error_bits_per_dim.tolist()
    energy = torch.stack(readout.eps_energy).mean(1).tolist()
    few = sorted({round(k) for k in np.linspace(0, len(energy) - 1, 6)})
    if len(readout.s) < ENOUGH_LEVELS:
        lines = [
            f"only {len(readout.s)} noise levels: the error bar is large and rough; use {ENOUGH_LEVELS} steps or more",
            *lines,
        ]
    if not readout.log_prob.isfinite().all():
        lines = ["the model returned NaN or infinity at some noise level; nothing can be read", *lines]
    return "\n".join(
        [
            *(f"image {i}: {b:.5f} ± {e:.5f} bits per dimension" for i, (b, e) in enumerate(zip(bits, errors))),
            "mean ||eps||^2 / D at s: "
            + ", ".join(f"{energy[k]:.3f} at {readout.s[k]:.3g}" for k in few)
            + " (near 1 wherever noise rules, if the model is calibrated)",
            f"D = {readout.dim}",
            *lines,
        ]
    )


def plot_of(readout: Readout) -> torch.Tensor:
    """Rate of log-density and squared norm of eps against log-SNR, a curve for each image: an IMAGE."""
    return curves_image(
        {
            "d log p / d log-SNR, nats per dimension": readout.rates().cpu().numpy(),
            "||eps||² / D": torch.stack(readout.eps_energy).cpu().numpy(),
        },
        "log-SNR, -2 ln s",
        -2 * np.log([min(s, 1e3) for s in readout.s]),
        [f"image {i}" for i in range(len(readout.log_prob))],
    )

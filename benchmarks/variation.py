"""Variation: how well it keeps the log-density, and how different the images are, on the exact-density model.

    python3 run.py bench variation

Writes docs/variation.json and .png. About four minutes on one core.
"""

import math

import comfy.samplers
import torch

from ..dg_core.variation import CORRECTIONS
from ..nodes import DensityGuidanceSampler, StochasticDetailVariation
from ..nodes.builtin.exact import PREDICTIONS, read
from ..nodes.host.variation_run import WINDOWS
from ..testing.euler_maruyama import fine_details_change
from ..testing.exact_runs import Bench
from ..testing.figures import figure
from .pages import DOCS, publish
from .tables import VARIATION_STRENGTHS

STEPS, STRENGTH, VARIATIONS = 32, 0.5, 32
STIFF = (("simple", 6), ("karras", 6), *(("exponential", n) for n in (8, 10, 12)), ("simple", 12), ("karras", 16))
STIFF_CFG, STIFF_COMPONENT, STIFF_IMAGES, STIFF_STRENGTHS = 8.0, 3, 48, (0.5, 1.0, 2.0, 3.0)
STRENGTHS, STARTS, PER_START = (0.125, 0.25, 0.5, 1.0, 2.0, 3.0), 8, 4
HOST_SAMPLERS = {
    "euler_ancestral": lambda eta: comfy.samplers.ksampler("euler_ancestral", {"eta": eta}),
    "dpmpp_2m_sde": lambda eta: comfy.samplers.ksampler("dpmpp_2m_sde", {"eta": eta}),
    # as the node SamplerER_SDE sets it for "Reverse-time SDE"
    "er_sde": lambda eta: comfy.samplers.ksampler("er_sde", {"noise_scaler": lambda x: x ** (eta + 1)}),
}


def varied(vary="fine details", strength=STRENGTH, correction="expected"):
    return StochasticDetailVariation.execute(0.5, 0.0, vary, strength, 0.0, 1.0, 1, correction, 1)[0]


def plain():
    return DensityGuidanceSampler.execute(0.5, 0.0, 0.0, 1.0)[0]


def repeated_noise(bench, starts):
    """`starts` noises, each for as many images of the batch as fit."""
    noise = bench.noise()
    return noise[:starts].repeat_interleave(len(noise) // starts, 0)


def nats(bench, sampler, sigmas, noise):
    """Log-density per dimension of every image, and the images."""
    samples = bench.sample(sampler, sigmas, noise)
    return -math.log(2) * torch.tensor(read(bench.model, samples, sigmas), dtype=torch.float64), samples


def distance(samples):
    """Root mean square difference per element between two images of a batch (n, ...) of independent ones."""
    return float(samples.double().var(0).mean().mul(2).sqrt())


def kept(prediction):
    """Bias, spread and model calls of every correction, beside Euler-Maruyama at as many calls."""
    bench = Bench(prediction, -1, VARIATIONS)
    sigmas, noise = bench.sigmas("simple", STEPS), repeated_noise(bench, 1)
    reference = nats(bench, plain(), sigmas, noise)[0]
    rows = {}
    for correction in CORRECTIONS:
        calls = []

        def count(executor, *args, **kwargs):
            calls.append(1)
            return executor(*args, **kwargs)

        counted = Bench(prediction, -1, VARIATIONS)
        counted.model = counted.model.clone()
        counted.model.add_wrapper("apply_model", count)
        change = nats(counted, varied(correction=correction), sigmas, noise)[0] - reference
        em = fine_details_change(bench.model, sigmas.tolist(), STRENGTH, len(calls), VARIATIONS)
        rows[correction] = {
            "calls": len(calls),
            "bias": float(change.mean()),
            "spread": float(change.std()),
            "euler_maruyama_bias": float(em.mean()),
            "euler_maruyama_spread": float(em.std()),
        }
        print(prediction, correction, rows[correction], flush=True)
    return rows


def high_energy(difference):
    """Energy above half of the Nyquist frequency, by radius, and in all: per image and element."""
    energy = torch.fft.fft2(difference.double(), norm="ortho").abs().square().mean((0, 1))
    f = torch.fft.fftfreq(difference.shape[-1], dtype=torch.float64)
    high = torch.hypot(f[:, None], f[None, :]) > 0.25
    return float(energy[high].sum() / energy.numel()), float(energy.mean())


def diversity(prediction):
    """Distance between variations in low and high frequencies, by preset and strength, and between seeds."""
    bench = Bench(prediction, -1, STARTS * PER_START)
    sigmas = comfy.samplers.calculate_sigmas(bench.sampling, "simple", STEPS)
    noise = repeated_noise(bench, STARTS)

    def split(samples):
        """Between images of a group (groups, n, ...): distances in low and in high frequencies, share of high."""
        centred = (samples - samples.mean(1, keepdim=True)).flatten(0, 1)
        high, whole = (2 * samples.shape[1] / (samples.shape[1] - 1) * v for v in high_energy(centred))
        return {"low": math.sqrt(whole - high), "high": math.sqrt(high), "share_high": high / whole}

    seeds = bench.sample(plain(), sigmas, bench.noise())
    rows = {"seeds": split(seeds[None])}
    for vary in WINDOWS:
        rows[vary] = {}
        for strength in STRENGTHS:
            samples = bench.sample(varied(vary, strength), sigmas, noise)
            rows[vary][str(strength)] = split(samples.view(STARTS, PER_START, *samples.shape[1:]))
        print(prediction, vary, {k: f"{v['low']:.2f} {v['high']:.2f}" for k, v in rows[vary].items()}, flush=True)
    return rows


def host_samplers(prediction):
    """Bias and spread of the log-density over variation seeds at the diversity of "fine details": {name: ...}.

    The bias is that against the own solver, or the host's sampler, without noise.
    """
    bench = Bench(prediction, -1, VARIATIONS)
    sigmas, noise = bench.sigmas("simple", STEPS), repeated_noise(bench, 1)
    log_density, samples = nats(bench, varied(), sigmas, noise)
    wanted = distance(samples)

    def kept_by(log_density, still):
        return {"bias": float((log_density - nats(bench, still, sigmas, noise)[0]).mean()), "spread": float(log_density.std())}

    rows = {"Stochastic Detail Variation": {"strength": STRENGTH, "distance": wanted, **kept_by(log_density, plain())}}
    for name, sampler in HOST_SAMPLERS.items():
        low, high = 1e-3, 1.0
        for _ in range(9):  # by bisection, in the logarithm
            middle = math.sqrt(low * high)
            log_density, samples = nats(bench, sampler(middle), sigmas, noise)
            low, high = (middle, high) if distance(samples) < wanted else (low, middle)
        rows[name] = {"eta": middle, "distance": distance(samples), **kept_by(log_density, sampler(0.0))}
        print(prediction, name, rows[name], flush=True)
    return rows


def strong(prediction):
    """Bias of every correction at strengths from 1 on: {vary: {correction: [bias by strength]}}."""
    bench = Bench(prediction, -1, VARIATIONS)
    sigmas, noise = bench.sigmas("simple", STEPS), repeated_noise(bench, 1)
    reference = nats(bench, plain(), sigmas, noise)[0]
    rows = {
        vary: {
            correction: [
                float((nats(bench, varied(vary, c, correction), sigmas, noise)[0] - reference).mean())
                for c in VARIATION_STRENGTHS
            ]
            for correction in CORRECTIONS
        }
        for vary in ("fine details", "everything")
    }
    print(prediction, rows, flush=True)
    return rows


def out_of_range(prediction):
    """{scheduler and steps: {sampler: images out of range}} with "everything" at a high CFG in few steps.

    Out of range is an image with an element beyond 1.5 times the largest of Euler's images at 100 steps.
    """
    bench = Bench(prediction, STIFF_COMPONENT, STIFF_IMAGES)
    negative = Bench(prediction, -1, 1).conditioning
    noise = bench.noise()

    def reach(sampler, scheduler, steps):
        guider = comfy.samplers.CFGGuider(bench.model)
        guider.set_conds(bench.conditioning, negative)
        guider.set_cfg(STIFF_CFG)
        sigmas = comfy.samplers.calculate_sigmas(bench.sampling, scheduler, steps)
        samples = guider.sample(noise, bench.latent["samples"], sampler, sigmas, seed=11, disable_pbar=True)
        return samples.abs().flatten(1).amax(1)

    euler = comfy.samplers.ksampler("euler")
    limit = 1.5 * float(reach(euler, "simple", 100).max())
    samplers = {
        "own solver, no noise": plain(),
        "euler": euler,
        **{name: comfy.samplers.ksampler(name) for name in ("euler_ancestral", "dpmpp_2m_sde")},
        **{f"{correction} {c:g}": varied("everything", c, correction) for correction in CORRECTIONS for c in STIFF_STRENGTHS},
    }
    rows = {}
    for scheduler, steps in STIFF:
        row = rows[f"{scheduler} {steps}"] = {
            name: int((~(reach(sampler, scheduler, steps) <= limit)).sum()) for name, sampler in samplers.items()
        }
        print(prediction, scheduler, steps, row, flush=True)
    return rows


def measure():
    return {
        "steps": STEPS,
        "strength": STRENGTH,
        "variations": VARIATIONS,
        "windows": WINDOWS,
        "kept": {p: kept(p) for p in PREDICTIONS},
        "host_samplers": {p: host_samplers(p) for p in ("eps", "flow")},
        "diversity": {p: diversity(p) for p in ("eps", "flow")},
        "strong": {p: strong(p) for p in ("eps", "flow")},
        "out_of_range": {p: out_of_range(p) for p in ("eps", "flow")},
    }


def plot(results):
    by_model = results["diversity"]
    with figure(DOCS / "variation.png", len(by_model), 2, figsize=(10, 7), sharex=True) as (_, axes):
        for row, (prediction, by) in zip(axes, by_model.items()):
            for axis, band in zip(row, ("low", "high")):
                for name in (n for n in by if n != "seeds"):
                    axis.plot([float(c) for c in by[name]], [r[band] for r in by[name].values()], "o-", label=name)
                axis.axhline(by["seeds"][band], color="grey", linestyle="--", label="another seed")
                axis.set_xscale("log")
                axis.set_yscale("log")
                axis.set_title(f"{prediction}, {band} frequencies")
                axis.set_ylabel("distance")
        for axis in axes[-1]:
            axis.set_xticks(STRENGTHS, [f"{c:g}" for c in STRENGTHS])
            axis.minorticks_off()
            axis.set_xlabel("strength")
        axes[0][0].legend()


def main():
    results = measure()
    publish("variation", results)
    plot(results)

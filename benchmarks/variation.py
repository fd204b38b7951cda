"""Variation: how well it keeps the log-density, and how different the pictures are, on the exact-density model.

    python3 run.py bench variation

Writes docs/variation.json and from it docs/variation.md and docs/variation.png. About four minutes on one core.
"""

import json
import math

import comfy.samplers
import matplotlib
import torch

from ..dg_core.variation import CORRECTIONS
from ..launcher.environment import PACK
from ..nodes import DensityGuidanceSampler, StochasticDetailVariation
from ..nodes.builtin.exact import PREDICTIONS, read
from ..nodes.stochastic_variation import WINDOWS
from .detail_shift import Bench
from ..testing.euler_maruyama import fine_details_change

DOCS = PACK / "docs"
STEPS, STRENGTH, VARIATIONS = 32, 0.5, 32
STRONG = (1.0, 2.0, 3.0)
STIFF = (("simple", 6), ("karras", 6), ("exponential", 8), ("exponential", 10), ("exponential", 12), ("simple", 12), ("karras", 16))
STIFF_CFG, STIFF_COMPONENT, STIFF_PICTURES, STIFF_STRENGTHS = 8.0, 3, 48, (0.5, 1.0, 2.0, 3.0)
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
            "calls": len(calls), "bias": float(change.mean()), "spread": float(change.std()),
            "euler_maruyama_bias": float(em.mean()), "euler_maruyama_spread": float(em.std())}
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

    rows = {"Stochastic Detail Variation": {
        "strength": STRENGTH, "distance": wanted, **kept_by(log_density, plain())}}
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
    rows = {vary: {correction: [
        float((nats(bench, varied(vary, c, correction), sigmas, noise)[0] - reference).mean()) for c in STRONG]
        for correction in CORRECTIONS} for vary in ("fine details", "everything")}
    print(prediction, rows, flush=True)
    return rows


def out_of_range(prediction):
    """{scheduler and steps: {sampler: pictures out of range}} with "everything" at a high CFG in few steps.

    Out of range is a picture with an element beyond 1.5 times the largest of Euler's pictures at 100 steps.
    """
    bench = Bench(prediction, STIFF_COMPONENT, STIFF_PICTURES)
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
    samplers = {"own solver, no noise": plain(), "euler": euler, **{
        name: comfy.samplers.ksampler(name) for name in ("euler_ancestral", "dpmpp_2m_sde")}, **{
        f"{correction} {c:g}": varied("everything", c, correction) for correction in CORRECTIONS for c in STIFF_STRENGTHS}}
    rows = {}
    for scheduler, steps in STIFF:
        row = rows[f"{scheduler} {steps}"] = {
            name: int((~(reach(sampler, scheduler, steps) <= limit)).sum()) for name, sampler in samplers.items()}
        print(prediction, scheduler, steps, row, flush=True)
    return rows


def measure():
    return {
        "steps": STEPS, "strength": STRENGTH, "variations": VARIATIONS, "windows": {
            name: {"VE" if slope == 0 else "flow": percents for slope, percents in by.items()}
            for name, by in WINDOWS.items()},
        "kept": {p: kept(p) for p in PREDICTIONS},
        "host_samplers": {p: host_samplers(p) for p in ("eps", "flow")},
        "diversity": {p: diversity(p) for p in ("eps", "flow")},
        "strong": {p: strong(p) for p in ("eps", "flow")},
        "out_of_range": {p: out_of_range(p) for p in ("eps", "flow")},
    }


def tables(results):
    """The markdown of a result: (kept, host samplers, presets, strengths, out of range)."""
    rows = ["| model | correction | model calls | bias | spread | Euler-Maruyama, as many calls: bias | spread |",
            "|---|---|---|---|---|---|---|"]
    for p, by in results["kept"].items():
        rows += [f"| {p} | {c} | {r['calls']} | {r['bias']:+.1e} | {r['spread']:.1e} | {r['euler_maruyama_bias']:+.1e} "
                 f"| {r['euler_maruyama_spread']:.1e} |" for c, r in by.items()]
    samplers = results["host_samplers"]
    names = list(next(iter(samplers.values())))
    hosts = [f"| sampler | {' | '.join(f'{p}: distance | bias | spread' for p in samplers)} |",
             "|---|" + "---|---|---|" * len(samplers)]
    for name in names:
        by_model = [by[name] for by in samplers.values()]
        hosts.append(f"| {name} | " + " | ".join(
            f"{r['distance']:.3f} | {r['bias']:+.1e} | {r['spread']:.1e}" for r in by_model) + " |")
    presets = ["| model | vary | strength | low frequencies | high frequencies | share of high |",
               "|---|---|---|---|---|---|"]
    for p, by in results["diversity"].items():
        for name, values in by.items():
            for strength, r in (values.items() if name != "seeds" else [("-", values)]):
                label = "another seed, plain sampler" if name == "seeds" else name
                presets.append(
                    f"| {p} | {label} | {strength} | {r['low']:.3f} | {r['high']:.3f} | {r['share_high']:.0%} |")
    strengths = ["| model | vary | correction | " + " | ".join(f"strength {c:g}" for c in STRONG) + " |",
                 "|---|---|---|" + "---|" * len(STRONG)]
    strengths += [f"| {p} | {vary} | {correction} | " + " | ".join(f"{b:+.1e}" for b in biases) + " |"
                  for p, by in results["strong"].items() for vary, rs in by.items() for correction, biases in rs.items()]
    stiff = results["out_of_range"]
    columns = [(p, row) for p, by in stiff.items() for row in by]
    ranges = ["| sampler | " + " | ".join(f"{p}, {row}" for p, row in columns) + " |", "|---|" + "---|" * len(columns)]
    for name in next(iter(stiff["eps"].values())):
        ranges.append(f"| {name} | " + " | ".join(str(stiff[p][row][name]) for p, row in columns) + " |")
    return tuple("\n".join(t) for t in (rows, hosts, presets, strengths, ranges))


def page(results):
    kept_table, hosts, presets, strengths, ranges = tables(results)
    strong = [by["structure"][str(c)]["low"] / by["seeds"]["low"]
              for by in results["diversity"].values() for c in STRENGTHS if c >= 1]
    windows = "\n".join(
        f"* {name}: " + ", ".join(f"{a:g} to {b:g} of the sampling ({kind})" for kind, (a, b) in by.items())
        for name, by in results["windows"].items())
    return f"""# Variation, measured

Made by `python3 run.py bench variation` from [variation.json](variation.json), inside ComfyUI, \
on the exact-density model whose
log-density is known exactly (32x32, {results["steps"]} steps of the scheduler `simple`, \
read at the last noise level above
zero). Numbers of log-density are nats per dimension.

## The log-density is kept

"fine details" at strength {results["strength"]:g}: change of the log-density against the run without noise, \
its mean (bias) and
standard deviation (spread) over {results["variations"]} variations of one picture. \
Beside it Euler-Maruyama for the same SDE
in the same window, with the exact divergence and the exact projection, at as many model calls.

{kept_table}

As the steps become small the bias falls in proportion to them, as that of Euler-Maruyama does (weak order 1, \
measured 0.75
to 0.9 on a Gaussian of many scales: `python3 run.py test -s tests/test_variation.py`); it is its size that differs.

Bias of strong noise, with the same steps, over {results["variations"]} variations of one picture:

{strengths}

## Against the samplers that add noise

Bias and spread of the log-density over {results["variations"]} noises of the sampler, from one starting noise. The bias is \
that against
the same sampler without its noise. The noise of each
sampler (`eta`) is turned down until two pictures are as far apart as with "fine details" at strength
{results["strength"]:g} (root mean square distance, pictures in [-1, 1]). \
Where a little more noise already makes another
picture out of some of them, they stay closer together.

{hosts}

## What the presets change

![distance between variations against strength](variation.png)

Root mean square distance per element between two variations of a picture, split at half of the Nyquist frequency. White
noise has 80% of its energy above it. From strength 1 on, two variations of "structure" are {min(strong):.0%} to \
{max(strong):.0%} as far apart in low
frequencies as the pictures of two seeds ({STARTS} pictures, {PER_START} variations of each). The distance from the picture \
without noise
grows up to strength 3 (tests/test_stochastic_variation.py).

{presets}

The presets are shares of the model's sampling, hence windows of its log-SNR:

{windows}

## Few steps at a high CFG

How many of {STIFF_PICTURES} pictures go out of range at CFG {STIFF_CFG:g}, "everything", by the strength of the noise: with \
an element beyond 1.5
times the largest of Euler's pictures at 100 steps. On the flow model the schedules exponential and karras are too \
coarse for every sampler.

{ranges}
"""


def plot(results, path):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_model = results["diversity"]
    figure, axes = plt.subplots(len(by_model), 2, figsize=(10, 7), layout="constrained", sharex=True)
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_page(results):
    (DOCS / "variation.md").write_text(page(results))
    plot(results, DOCS / "variation.png")


def main():
    DOCS.mkdir(exist_ok=True)
    results = measure()
    (DOCS / "variation.json").write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)

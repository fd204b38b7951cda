"""Score alignment on the exact-density model: cost against accuracy, agreement of the ways, predicted and measured response.

    python3 run.py bench score_alignment

Writes docs/score_alignment.json and .png. About eight minutes.
"""

import gc
import math

import numpy as np
import torch
from comfy_extras import nodes_custom_sampler as custom

from ..dg_core import alignment, divergence
from ..dg_core.exact_density import ExactDensity
from ..dg_core.levels import noise_levels
from ..dg_core.schedule import VE
from ..nodes import DensityGuidanceSampler, LoadExactDensityModel, PriorGuidanceScale
from ..nodes.builtin import exact as exact_model
from ..nodes.builtin.exact import EMOJI_RANGE, PREDICTIONS, WEIGHTS
from ..nodes.host.alignment_run import CheckSettings, examine
from ..nodes.host.model_access import path_of
from ..testing import host_runs as h
from ..testing import networks
from ..testing.figures import figure
from ..testing.measures import check, without_forward_mode
from .pages import DOCS, publish, read
from .tables import ALIGNMENT_CALLS

OURS, AUTHORS = "third and fourth order, VP state", "Euler, uniform in log-SNR"
S_START, S_END = EMOJI_RANGE.sigma_max, 0.15
SIZE, SEEDS = 16, 12  # of the comparison of solvers
EVALUATIONS = {OURS: (16, 24, 32, 48, 64, 96), AUTHORS: (32, 64, 128, 256, 512, 1024)}
CONVERGED = 768
BATCH, STEPS = 64, (32, 64)  # of the runs in the host
STEP_FACTORS = [2.0**k for k in range(-6, 5)]
MEMORY_SIZE, MEMORY_BATCH = 48, 2
BENDING = (10.0, 16.0, 25.0)  # noise levels at which the density chooses between its components


class Flow:
    """The exact density of small images, its derivative in closed form, from one noise for all solvers."""

    def __init__(self, component):
        self.density = ExactDensity.load(WEIGHTS, SIZE)
        self.weights = None if component is None else self.density.one_hot(component)
        self.noise = torch.randn(SEEDS, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def differentiate(self, y, s, tangent):
        """(denoised, derivative): d denoised = tangent + s^2 H tangent."""
        bend = self.density.hessian_product(y, s, tangent, self.weights)
        return self.density.denoised(y, s, self.weights), tangent + s**2 * bend

    def ours(self, evaluations):
        x = self.noise * math.hypot(1, S_START)
        levels = noise_levels(S_END, S_START, evaluations, self.density.dim)[::-1]
        _, profile = alignment.trace_alignment(
            lambda *a: (*self.differentiate(*a), None), None, x, -x, levels, VE, evaluations - 1
        )
        return profile.alignment[-1]

    def authors(self, evaluations):
        """Euler steps of the variance-preserving state and its tangent, uniform in log-SNR, and the score at the end.

        du = (cos(theta) eps - sin(theta) denoised) dtheta with dtheta = sin(theta) cos(theta) dln(s).
        """
        u, w = self.noise, -self.noise
        levels = np.geomspace(S_START, S_END, evaluations).tolist()
        for s, lower in zip(levels, [*levels[1:], None]):
            radius = math.hypot(1, s)
            denoised, derivative = self.differentiate(u * radius, s, w * radius)
            eps, eps_w = (u * radius - denoised) / s, (w * radius - derivative) / s
            if lower is None:
                return -((eps / s) * (w * radius)).flatten(1).sum(1)
            step = math.log(lower / s) * s / radius**2
            u, w = u + step * (eps - s * denoised) / radius, w + step * (eps_w - s * derivative) / radius


def solver_errors():
    """{density: {solver: {evaluations: [RMS, median] relative error of A over the seeds}}}."""
    results = {}
    for name, component in (("one Gaussian", 5), ("whole mixture", None)):
        flow = Flow(component)
        true = flow.ours(CONVERGED)
        relative = lambda a: ((a - true) / true).abs()
        results[name] = {"converged to": float(relative(flow.ours(CONVERGED // 2)).max())}
        for solver, run in ((OURS, flow.ours), (AUTHORS, flow.authors)):
            errors = {n: relative(run(n)) for n in EVALUATIONS[solver]}
            results[name][solver] = {n: [float(e.square().mean().sqrt()), float(e.median())] for n, e in errors.items()}
        print(name, results[name], flush=True)
    return results


def host_runs(prediction, steps):
    """64 seeds in the host: the two ways, and the response that 1% of scaling really has."""
    model, _, conditioning, latent = LoadExactDensityModel.execute(prediction, "32", -1, BATCH).args
    sampling = model.get_model_object("model_sampling")
    sigmas = custom.BasicScheduler.execute(model, "simple", steps, 1.0).args[0]
    guider = custom.BasicGuider.execute(model, conditioning).args[0]
    noise = custom.RandomNoise.execute(7).args[0]
    check = examine(guider, noise, latent, sigmas, CheckSettings("both"))
    dim = check.samples[0].numel()
    cosine, other = (c[-1] for c in check.cosines.values())
    with_score, without = check.alignment, check.alignment * other / cosine

    cut = sigmas[: len(check.sigmas)]
    sampler = DensityGuidanceSampler.execute(0.5, 0.0, 0.0, 1.0).args[0]
    # The measured change is that of the converged flow, not of the steps that a user would take.
    between = [torch.logspace(math.log10(a), math.log10(b), 5)[:-1] for a, b in zip(cut.tolist(), cut[1:].tolist())]
    fine = torch.cat([*between, cut[-1:]])

    def bits(scale):
        scaled = PriorGuidanceScale.execute(noise, 0.5, scale, False).args[0]
        result = custom.SamplerCustomAdvanced.execute(scaled, guider, sampler, fine, latent).args[0]
        return torch.tensor(exact_model.read(model, result["samples"], fine), dtype=torch.float64)

    measured = bits(1.005) - bits(0.995)
    predicted = alignment.percent_response(with_score, dim)
    bias = without - with_score
    return {
        "correlation": float(torch.corrcoef(torch.stack([with_score, without]))[0, 1]),
        "bias in standard errors": float(bias.mean() / (bias.std() / BATCH**0.5)),
        "bias": float((bias / with_score).mean()),
        "spread": float((bias / with_score).std()),
        "response within 5%": float(((predicted / measured - 1).abs() < 0.05).double().mean()),
        "response error, median": float((predicted / measured - 1).abs().median()),
        "response": float(predicted.mean()),
        "aligned": float((with_score > 0).double().mean()),
        "s_end": path_of(sampling).s(check.sigmas[-1]),
    }


def step_errors():
    """{order: relative RMS error of the derivative by differences in float32, for multiples of the chosen step}."""
    density = ExactDensity.load(WEIGHTS, SIZE)
    generator = torch.Generator().manual_seed(3)
    results = {"first": {}, "second": {}}
    first, second = [], []
    for s in BENDING:
        x = density.sample(SEEDS, s, generator)
        v = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        p = divergence.rademacher(x, 0, 0)
        predict = lambda x: density.denoised(x, s).float()
        exact = v + s**2 * density.hessian_product(x, s, v)
        h = 1e-4 * s
        exact_t = divergence.probe_trace(
            p, (s**2 / (2 * h)) * (density.hessian_product(x + h * v, s, p) - density.hessian_product(x - h * v, s, p))
        )
        step = divergence.difference_step(x, v, torch.float32, s)
        steps = divergence.trace_steps(x, v, torch.float32, divergence.DIFFERENCES, s)
        rms = lambda error, size: float((error.square().mean() / size.square().mean()).sqrt())
        first.append(
            [
                rms(
                    divergence.directional_derivative(predict, x.float(), v.float(), divergence.DIFFERENCES, k * step)[1]
                    - exact,
                    exact,
                )
                for k in STEP_FACTORS
            ]
        )
        second.append(
            [
                rms(
                    divergence.trace_derivative(
                        predict,
                        x.float(),
                        v.float(),
                        lambda _: [p.float()],
                        divergence.DIFFERENCES,
                        tuple(k * a for a in steps),
                    )[2]
                    - exact_t,
                    exact_t,
                )
                for k in STEP_FACTORS
            ]
        )
    for name, rows in (("first", first), ("second", second)):
        results[name] = dict(zip(map(str, STEP_FACTORS), np.median(rows, axis=0).tolist()))
    return results


def memory():
    """{derivatives: {way: peak of what is allocated, relative to sampling the same batch}} on a UNet of the host."""
    model, positive = networks.unet(), networks.unet_conditioning()
    latent = {"samples": torch.zeros(MEMORY_BATCH, 4, MEMORY_SIZE, MEMORY_SIZE)}
    plain = peak(lambda: h.sample(model, "euler", h.schedule(model, 3), latent, positive=positive))
    found = {}
    for name, network in (("forward-mode AD", model), ("differences", without_forward_mode(model))):
        found[name] = {
            way: peak(lambda: check(network, way, 3, positive=positive, latent=latent)) / plain
            for way in ("with score", "without score")
        }
        print(name, found[name], flush=True)
    return found


def peak(run):
    """Most bytes by which what torch has allocated rises during run(); what was there before and is freed does not count."""
    run()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return float((held - np.minimum.accumulate(np.minimum(held, 0))).max())


def plot(results):
    with figure(DOCS / "score_alignment.png", 1, 2, figsize=(10, 4)) as (_, (left, right)):
        for density, style in (("one Gaussian", "--"), ("whole mixture", "-")):
            for solver, colour in ((OURS, "C0"), (AUTHORS, "C1")):
                points = results["solvers"][density][solver]
                left.loglog(
                    [ALIGNMENT_CALLS * int(n) for n in points],
                    [rms for rms, _ in points.values()],
                    style,
                    marker=".",
                    color=colour,
                    label=f"{solver}, {density}",
                )
        left.set_xlabel("model calls for each image")
        left.set_ylabel("RMS relative error of A")
        for name, colour in (("first", "C2"), ("second", "C3")):
            points = results["steps"][name]
            right.loglog(
                [float(k) for k in points], list(points.values()), marker=".", color=colour, label=f"{name} derivative"
            )
        right.axvline(1, color="grey", linewidth=0.8)
        right.set_xlabel("step of the differences, in units of the chosen one")
        right.set_ylabel("relative error in float32")
        for axis in (left, right):
            axis.legend(fontsize=8)


def main():
    publish(
        "score_alignment",
        {
            "memory": memory(),
            "steps": step_errors(),
            "solvers": solver_errors(),
            "host": {p: {n: host_runs(p, n) for n in STEPS} for p in PREDICTIONS},
        },
    )
    plot(read("score_alignment"))

"""How exactly does guidance shift the log-density: every sampler and scheduler of the host, on the exact-density model.

    python3 run.py bench detail_shift

Writes docs/detail_shift.json and .png. About ten minutes on two cores.
"""

import comfy.samplers
import torch

from ..dg_core.units import quantile_to_z
from ..nodes import DensityGuidanceSampler, PriorGuidanceScale
from ..nodes.builtin.exact import PREDICTIONS
from ..testing.exact_runs import Bench
from ..testing.figures import figure
from ..testing.gaussian_oracle import GaussianOracle
from ..testing.measures import predicted_bits
from .pages import DOCS, publish
from .tables import OWN

COMPONENT, QUANTILE, STEPS = 5, 0.3, 20
ACCURACY_STEPS, ACCURACY_QUANTILES = 32, (0.05, 0.3, 0.7, 0.95)
LEVELS, SEEDS = (0.05, 0.3, 0.5, 0.7, 0.95), 64


def guided(name, quantile):
    sampler = None if name == OWN else comfy.samplers.sampler_object(name)
    return DensityGuidanceSampler.execute(quantile, 0.0, 0.0, 1.0, sampler)[0]


def sampler_shifts(prediction):
    """Measured over predicted change of bits per dimension for every sampler: {name: ratio}."""
    bench = Bench(prediction, COMPONENT, 4)
    sigmas, noise = bench.sigmas("simple", STEPS), bench.noise()
    predicted = predicted_bits(QUANTILE, bench.density.dim, bench.path, sigmas)
    ratios = {}
    for name in (OWN, *comfy.samplers.SAMPLER_NAMES):
        change = bench.bits(guided(name, QUANTILE), sigmas, noise) - bench.bits(guided(name, 0.5), sigmas, noise)
        ratios[name] = float(change.mean()) / predicted
        print(f"{prediction:5}{name:32}{ratios[name]:8.3f}", flush=True)
    return predicted, ratios


def scheduler_errors(prediction):
    """Worst error in nats per dimension against the converged flow: {scheduler: {own solver, euler}}."""
    bench = Bench(prediction, COMPONENT, 2)
    oracle = GaussianOracle(bench.density, COMPONENT)
    noise = bench.noise()
    errors = {}
    for scheduler in comfy.samplers.SCHEDULER_NAMES:
        sigmas = comfy.samplers.calculate_sigmas(bench.sampling, scheduler, ACCURACY_STEPS)
        schedule = sigmas.tolist()
        last = schedule[-2]
        errors[scheduler] = {OWN: 0.0, "euler": 0.0}
        for quantile in ACCURACY_QUANTILES:
            first = {}
            for name in (OWN, "euler"):
                states = {}
                bench.sample(
                    guided(name, quantile), sigmas, noise, lambda i, denoised, x, total: states.__setitem__(i, x.double())
                )
                if not first:
                    first["unit"] = states[0] / schedule[0]
                    true = oracle.converged(first["unit"], schedule, bench.path, quantile_to_z(quantile))
                    s = bench.path.s(last)
                    expected = oracle.log_prob(true, s)
                y = states[max(states)] / bench.path.alpha(last)
                error = (oracle.log_prob(oracle.coefficients(y), s) - expected).abs().max() / oracle.dim
                errors[scheduler][name] = max(errors[scheduler][name], float(error))
        print(f"{prediction:5}{scheduler:20}{errors[scheduler][OWN]:10.1e}{errors[scheduler]['euler']:10.1e}", flush=True)
    return errors


def mixture_levels(prediction, steps):
    """Share of seeds whose density rises with every level, mean bits per dimension of the levels, and predicted shifts."""
    bench = Bench(prediction, -1, SEEDS)
    sigmas = bench.sigmas("simple", steps)
    source = type("Seeds", (), {"seed": 5, "generate_noise": lambda self, latent: bench.noise()})()
    noise = PriorGuidanceScale.execute(source, 0.5, 1.0, True)[0].generate_noise(bench.latent)
    bits = torch.stack([bench.bits(guided(OWN, q), sigmas, noise) for q in LEVELS])
    rising = float((bits.diff(dim=0) < 0).all(0).float().mean())
    print(f"{prediction:5} mixture, {steps} steps: {rising:.0%} of {SEEDS} seeds", flush=True)
    return {
        "monotone": rising,
        "bits_per_dim": bits.mean(1).tolist(),
        "predicted_shifts": [predicted_bits(q, bench.density.dim, bench.path, sigmas) for q in LEVELS],
    }


def measure():
    shifts = {p: sampler_shifts(p) for p in PREDICTIONS}
    return {
        "quantile": QUANTILE,
        "steps": STEPS,
        "accuracy_steps": ACCURACY_STEPS,
        "levels": LEVELS,
        "seeds": SEEDS,
        "predicted_bits_per_dim": {p: shifts[p][0] for p in PREDICTIONS},
        "measured_over_predicted": {p: shifts[p][1] for p in PREDICTIONS},
        "scheduler_errors": {p: scheduler_errors(p) for p in PREDICTIONS},
        "mixture": {p: {str(n): mixture_levels(p, n) for n in (20, 50)} for p in PREDICTIONS},
    }


def plot(results):
    ratios = results["measured_over_predicted"]
    with figure(DOCS / "detail_shift.png", figsize=(11, 4.5)) as (_, axis):
        for kind, marker in zip(("eps", "flow"), "o^"):
            axis.plot(list(ratios[kind]), list(ratios[kind].values()), marker, label=kind)
        axis.axhline(1, color="grey", linewidth=1)
        axis.set_yscale("log")
        axis.set_ylabel("measured / predicted shift")
        axis.set_title(f"Quantile {results['quantile']:g}, {results['steps']} steps: 1 is exact")
        axis.tick_params(axis="x", rotation=90)
        axis.legend()


def main():
    results = measure()
    publish("detail_shift", results)
    plot(results)

"""How exactly does guidance shift the log-density: every sampler and scheduler of the host, on the exact-density model.

    python3 run.py bench detail_shift

Writes docs/detail_shift.json and from it docs/detail_shift.md and .png. About ten minutes on two cores.
"""

import json

import comfy.samplers
import matplotlib
import torch

from ..dg_core.control import gain_of, guided_steps, predicted_shift
from ..dg_core.schedule import Schedule
from ..nodes.host.model_access import path_of
from ..dg_core.units import nats_to_bits_per_dim
from ..launcher.environment import PACK
from ..nodes import DensityGuidanceSampler, LoadExactDensityModel, PriorGuidanceScale
from ..nodes.builtin.exact import PREDICTIONS, read
from ..testing.gaussian_oracle import GaussianOracle

DOCS = PACK / "docs"
OWN = "own solver"
COMPONENT, QUANTILE, STEPS = 5, 0.3, 20
ACCURACY_STEPS, ACCURACY_QUANTILES = 32, (0.05, 0.3, 0.7, 0.95)
LEVELS, SEEDS = (0.05, 0.3, 0.5, 0.7, 0.95), 64


class Bench:
    """One prediction type of the model, at 32x32."""

    def __init__(self, prediction, component, batch):
        self.model, _, self.conditioning, self.latent = LoadExactDensityModel.execute(
            prediction, "32", component, batch).args
        self.sampling = self.model.get_model_object("model_sampling")
        self.path = path_of(self.sampling)
        self.density = self.model.model.density
        self.weights = None if component < 0 else self.density.one_hot(component)

    def sigmas(self, scheduler, steps):
        """Without the step to zero: the density is read at the last level above it."""
        return comfy.samplers.calculate_sigmas(self.sampling, scheduler, steps)[:-1]

    def sample(self, sampler, sigmas, noise, callback=None):
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(self.conditioning, self.conditioning)
        return guider.sample(noise, self.latent["samples"], sampler, sigmas, seed=11, disable_pbar=True,
                             callback=callback)

    def predicted(self, quantile, sigmas):
        """The shift of bits per dimension against quantile 0.5 that guidance over the whole schedule is to give."""
        log_range, dim = guided_steps(Schedule(self.path, sigmas.tolist())).log_range, self.density.dim
        return nats_to_bits_per_dim(predicted_shift(gain_of(quantile, 0.0, dim, log_range)[0], log_range), dim)

    def noise(self):
        return torch.randn(self.latent["samples"].shape, generator=torch.Generator().manual_seed(5))

    def bits(self, sampler, sigmas, noise):
        return torch.tensor(read(self.model, self.sample(sampler, sigmas, noise), sigmas, self.weights))


def guided(name, quantile):
    sampler = None if name == OWN else comfy.samplers.sampler_object(name)
    return DensityGuidanceSampler.execute(quantile, 0.0, 0.0, 1.0, sampler)[0]


def sampler_shifts(prediction):
    """Measured over predicted change of bits per dimension for every sampler: {name: ratio}."""
    bench = Bench(prediction, COMPONENT, 4)
    sigmas, noise = bench.sigmas("simple", STEPS), bench.noise()
    predicted = bench.predicted(QUANTILE, sigmas)
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
                bench.sample(guided(name, quantile), sigmas, noise,
                             lambda i, denoised, x, total: states.__setitem__(i, x.double()))
                if not first:
                    first["unit"] = states[0] / schedule[0]
                    true = oracle.converged(first["unit"], schedule, bench.path, quantile_to_z(quantile))
                    s = bench.path.s(last)
                    expected = oracle.log_prob(true, s)
                y = states[max(states)] / bench.path.alpha(last)
                error = (oracle.log_prob(oracle.coefficients(y), s) - expected).abs().max() / oracle.dim
                errors[scheduler][name] = max(errors[scheduler][name], float(error))
        print(f"{prediction:5}{scheduler:20}{errors[scheduler][OWN]:10.1e}{errors[scheduler]['euler']:10.1e}",
              flush=True)
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
    return {"monotone": rising, "bits_per_dim": bits.mean(1).tolist(),
            "predicted_shifts": [bench.predicted(q, sigmas) for q in LEVELS]}


def measure():
    shifts = {p: sampler_shifts(p) for p in PREDICTIONS}
    return {
        "quantile": QUANTILE, "steps": STEPS, "accuracy_steps": ACCURACY_STEPS, "levels": LEVELS, "seeds": SEEDS,
        "predicted_bits_per_dim": {p: shifts[p][0] for p in PREDICTIONS},
        "measured_over_predicted": {p: shifts[p][1] for p in PREDICTIONS},
        "scheduler_errors": {p: scheduler_errors(p) for p in PREDICTIONS},
        "mixture": {p: {str(n): mixture_levels(p, n) for n in (20, 50)} for p in PREDICTIONS},
    }


def tables(results):
    """The markdown of a result: (samplers, schedulers, mixture)."""
    ratios, errors = results["measured_over_predicted"], results["scheduler_errors"]
    kinds = list(ratios)
    samplers = [f"| sampler | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    for name in ratios[kinds[0]]:
        samplers.append(f"| {name} | " + " | ".join(f"{ratios[p][name]:.2f}" for p in kinds) + " |")
    schedulers = [f"| scheduler | {' | '.join(f'{p}, own solver | {p}, euler' for p in kinds)} |",
                  "|---|" + "---|" * 2 * len(kinds)]
    for name in errors[kinds[0]]:
        schedulers.append(f"| {name} | " + " | ".join(
            f"{errors[p][name][OWN]:.1e} | {errors[p][name]['euler']:.1e}" for p in kinds) + " |")
    levels = " | ".join(f"q {q:g}" for q in results["levels"])
    mixture = [f"| model | steps | {levels} | seeds in order |", "|---|---|" + "---|" * (len(results["levels"]) + 1)]
    for p, by_steps in results["mixture"].items():
        for steps, r in by_steps.items():
            middle = r["bits_per_dim"][results["levels"].index(0.5)]
            bits = " | ".join(f"{b:.3f} ({middle + shift:.3f})" if shift else f"{b:.3f}"
                              for b, shift in zip(r["bits_per_dim"], r["predicted_shifts"]))
            mixture.append(f"| {p} | {steps} | {bits} | {r['monotone']:.0%} |")
    return tuple("\n".join(t) for t in (samplers, schedulers, mixture))


def page(results):
    samplers, schedulers, mixture = tables(results)
    return f"""# Measured against predicted

Made by `python3 run.py bench detail_shift` from [detail_shift.json](detail_shift.json), inside ComfyUI, on the exact-density
model whose log-density is known exactly (32x32).

![measured over predicted](detail_shift.png)

## Every sampler

Measured over predicted change of the log-density, quantile {results["quantile"]:g} against 0.5, \
{results["steps"]} steps of
the scheduler `simple`, one component of the model (a Gaussian), read at the last noise level above zero. 1.00 is exact.

{samplers}

Samplers that add noise (ancestral, SDE, lcm, ddpm) forget part of the guidance at every step. The `*_cfg_pp` samplers
renoise with an unguided prediction, so that the guidance of a step is not scaled by the step's length: it acts several
times as strongly as asked for. `dpm_adaptive` chooses its own steps, differently for the guided and the unguided run, \
and
the difference of their errors is part of its number.

## Every scheduler

Worst error of the log-density in nats per dimension against the converged guided flow, \
{results["accuracy_steps"]} steps,
one model call per step, quantiles 0.05, 0.3, 0.7 and 0.95: the pack's own solver, \
and ComfyUI's Euler with the same guidance.

{schedulers}

## The whole mixture

Mean exact bits per dimension over {results["seeds"]} seeds (own solver, noise at its median norm), in brackets what was
predicted from the one at quantile 0.5, and the share of seeds whose log-density rises with every step of the quantile.

{mixture}
"""


def plot(results, path):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratios = results["measured_over_predicted"]
    names = list(ratios["eps"])
    figure, axis = plt.subplots(figsize=(11, 4.5), layout="constrained")
    for kind, marker in zip(("eps", "flow"), "o^"):
        axis.plot(names, [ratios[kind][n] for n in names], marker, label=kind)
    axis.axhline(1, color="grey", linewidth=1)
    axis.set_yscale("log")
    axis.set_ylabel("measured / predicted shift")
    axis.set_title(f"Quantile {results['quantile']:g}, {results['steps']} steps: 1 is exact")
    axis.tick_params(axis="x", rotation=90)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_page(results):
    (DOCS / "detail_shift.md").write_text(page(results))
    plot(results, DOCS / "detail_shift.png")


def main():
    DOCS.mkdir(exist_ok=True)
    results = measure()
    (DOCS / "detail_shift.json").write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)

"""Error of log-density readouts against model evaluations, ours and the authors' scheme, and of explicit control.

    python3 run.py bench log_density

Writes docs/log_density.json and .png. Everything is measured on the exact-density model, whose density is known, in
nats per dimension; about eight minutes on one core. Parts that the file has from the same code are not run again.
"""

import math

import torch

from ..dg_core import divergence
from ..dg_core import log_density as ld
from ..dg_core.exact_density import ExactDensity
from ..dg_core.levels import noise_levels
from ..dg_core.schedule import FLOW, VE
from ..nodes.builtin import exact as exact_model
from ..nodes.host import target_run as dt
from ..testing import host_runs as h
from ..testing.figures import figure
from ..testing.measures import cut_schedule, exact_bits, exact_divergence, mean_image, target_sampler
from .pages import DOCS, publish, still_true

CODE = ["dg_core/*.py", "nodes/**/*.py"]
EVALUATIONS = [16, 32, 64, 128]
FLOOR = {"flow": 0.05, "eps": 0.1}
TOP = {"flow": math.inf, "eps": exact_model.EMOJI_RANGE.sigma_max}
PATHS = {"flow": FLOW, "eps": VE}
SHOWING_TOP = 60.0  # 15 times the images' standard deviation, as in SD 1.5
AUTHORS_TOP = 1000.0  # where their log-SNR ends; the prior is exact to 1e-5 there
OURS_PROBE, OURS_EXACT = "ours, one probe", "ours, exact divergence"
AUTHORS_PROBE, AUTHORS_EXACT = "authors' scheme, one probe", "authors' scheme, exact divergence"


class Known:
    """The exact density at one size: predictions, exact traces, and draws with their exact log p."""

    def __init__(self, size):
        self.density = ExactDensity.load(exact_model.WEIGHTS, size)
        self._mean = mean_image(self.density)
        self.dim = self.density.dim

    def draws(self, count, s, seed):
        y = self.density.sample(count, s, torch.Generator().manual_seed(seed))
        return y, self.density.log_prob(y, s)

    def predict(self, path):
        def predict(x, sigma):
            alpha = path.alpha(sigma)
            return self.density.denoised(x / alpha, sigma / alpha) if alpha > 0 else self._mean.expand_as(x)

        return predict

    def trace(self, y, s):
        return self.dim + s * s * self.density.laplacian(y, s)

    def exact_evaluate(self, path):
        """An evaluation with the exact trace, as `ProbedModel` but without probes."""
        predict = self.predict(path)

        def evaluate(x, sigma, call):
            alpha = path.alpha(sigma)
            zero = torch.zeros(len(x), dtype=torch.float64)
            return ld.Evaluation(predict(x, sigma), self.trace(x / alpha, sigma / alpha) if alpha > 0 else zero, zero)

        return evaluate


def ours(known, kind, y, evaluations, seed=None, top=None):
    """`Readout` with one probe a level from `seed`, or with the exact divergence. top: highest noise level (the model's)."""
    path, top = PATHS[kind], top or TOP[kind]
    levels = noise_levels(FLOOR[kind], top, evaluations - math.isfinite(top), known.dim)
    predict = known.predict(path)
    evaluate = known.exact_evaluate(path) if seed is None else ld.ProbedModel(predict, path, divergence.FORWARD, seed=seed)
    return ld.read_log_density(evaluate, predict, y, levels, path)


def authors(known, y, s_low, evaluations, seed=None):
    """log p (B,): Euler steps uniform in log-SNR on the variance-preserving state, one fresh probe a step."""
    s = torch.logspace(math.log10(s_low), math.log10(AUTHORS_TOP), evaluations + 1, dtype=torch.float64).tolist()
    u, gained = y / math.hypot(1, s_low), 0.0
    for call, (now, following) in enumerate(zip(s, s[1:])):
        y, step = u * math.hypot(1, now), math.log(following / now)
        if seed is None:
            denoised, trace = known.density.denoised(y, now), known.trace(y, now)
        else:
            v = divergence.rademacher(y, seed, call)
            denoised, slope = divergence.directional_derivative(lambda y: known.density.denoised(y, now), y, v, "forward")
            trace = divergence.probe_trace(v, slope)
        share = now * now / (1 + now * now)
        u = u + step * ((y - denoised) / math.hypot(1, now) - share * u)
        gained = gained + step * (known.dim * (share - 1) + trace)
    end = -0.5 * u.square().flatten(1).sum(1) - known.dim / 2 * math.log(2 * math.pi)
    return end - gained - known.dim / 2 * math.log1p(s_low**2)


def summary(error):
    """RMS, median and 90% quantile of |error|, nats per dimension."""
    size = error.abs()
    return {
        "rms": float(error.square().mean().sqrt()),
        "median": float(size.median()),
        "p90": float(size.quantile(0.9)),
        "images": len(error),
    }


def curves():
    """{size: {scheme: {evaluations: summary}}} on the flow model."""
    found = {}
    for size, count in ((32, 24), (64, 6)):
        known = Known(size)
        y, exact = known.draws(count, FLOOR["flow"], 11)
        rows = found[str(size)] = {name: {} for name in (OURS_PROBE, OURS_EXACT, AUTHORS_PROBE, AUTHORS_EXACT)}
        for n in EVALUATIONS if size == 32 else EVALUATIONS[:3]:
            for name, log_p in (
                (OURS_PROBE, ours(known, "flow", y, n, 1).log_prob),
                (OURS_EXACT, ours(known, "flow", y, n).log_prob),
                (AUTHORS_PROBE, authors(known, y, FLOOR["flow"], n, 1)),
                (AUTHORS_EXACT, authors(known, y, FLOOR["flow"], n)),
            ):
                rows[name][str(n)] = summary((log_p - exact) / known.dim)
            print(size, n, {name: f"{r[str(n)]['rms']:.1e}" for name, r in rows.items()}, flush=True)
    return found


def thirty_two():
    """At 32 evaluations: exact divergence by prediction type, and coverage of the standard error in 200 readouts."""
    found = {}
    for label, kind, top in (("flow", "flow", None), ("eps", "eps", None), (f"eps up to {SHOWING_TOP:g}", "eps", SHOWING_TOP)):
        for size, count in ((32, 64), (64, 16)):
            known = Known(size)
            y, exact = known.draws(count, FLOOR[kind], 21)
            name = f"{label}, {known.dim:,}"
            found[name] = summary((ours(known, kind, y, 32, top=top).log_prob - exact) / known.dim)
            print(name, found[name], flush=True)
    return {"exact divergence": found, "one probe": {kind: coverage(kind) for kind in ("flow", "eps")}}


def coverage(kind):
    """`summary` of 200 readouts with one probe, and in what share of them the stated standard error covers the truth."""
    known = Known(32)
    errors, inside = [], []
    for seed in range(2):
        y, exact = known.draws(100, FLOOR[kind], 31 + seed)
        readout = ours(known, kind, y, 32, seed)
        errors.append((readout.log_prob - exact) / known.dim)
        inside.append((readout.log_prob - exact).abs() < readout.standard_error)
    covered = {**summary(torch.cat(errors)), "covered": float(torch.cat(inside).double().mean())}
    print("coverage", kind, covered, flush=True)
    return covered


def control(results):
    """Exact density of what DensityTargetSampler makes: 32 steps of the host's simple schedule, 64 seeds, flow, eps.

    Fills `results`, and yields after each entry; those that are there already are left.
    """
    exact_options = {"tolerance": 3e-4}
    for kind in ("flow", "eps"):
        model = h.exact_model(kind)
        sigmas, latent = cut_schedule(model), h.empty_latent(64)
        plain = exact_bits(model, h.sampled(model, h.guided_sampler(), sigmas, latent), sigmas)
        level = float(plain.mean()) - 0.1
        probe, exact = lambda s: s, lambda s: exact_divergence(s, model)
        runs = {
            f"{kind}, {name}, {shift:+}": (make, (dt.SHIFT, shift), options)
            for name, make, options in (("one probe", probe, {}), ("exact divergence", exact, exact_options))
            for shift in (0.3, -0.3)
        }
        if kind == "flow":
            runs["flow, one probe, same"] = (probe, (dt.SAME,), {})
            runs["flow, exact divergence, same"] = (exact, (dt.SAME,), exact_options)
            runs["flow, one probe, absolute"] = (probe, (dt.ABSOLUTE, level), {})
        for name, (make, target, options) in runs.items():
            if name in results:
                continue
            got = exact_bits(model, h.sampled(model, make(target_sampler(*target, **options)), sigmas, latent), sigmas)
            if target[0] == dt.SAME:
                results[name] = {"spread": float(got.std()), "unguided spread": float(plain.std())}
            else:
                wanted = plain + target[1] if target[0] == dt.SHIFT else level
                results[name] = summary((got - wanted) * math.log(2))
            print(name, results[name], flush=True)
            yield


def plot(results):
    with figure(DOCS / "log_density.png", 1, 2, figsize=(10, 4), sharey=True) as (_, axes):
        for axis, (size, rows) in zip(axes, results["curves"].items()):
            for name, row in rows.items():
                axis.loglog(
                    [int(n) for n in row],
                    [r["rms"] for r in row.values()],
                    "o-" if "ours" in name else "s--",
                    label=name,
                    color="tab:blue" if "ours" in name else "tab:orange",
                    alpha=1 if "probe" in name else 0.5,
                )
            axis.set_title(f"D = {3 * int(size) ** 2:,}")
            axis.set_xlabel("model evaluations")
            axis.set_xticks(EVALUATIONS, EVALUATIONS)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("RMS error of log p, nats per dimension")
        axes[1].legend(loc="lower right")


def main():
    torch.set_num_threads(1)
    results = still_true("log_density", CODE)
    with torch.no_grad():
        for name, measure in (("curves", curves), ("at 32", thirty_two)):
            if name not in results:
                results[name] = measure()
                publish("log_density", results)
    for _ in control(results.setdefault("control", {})):
        publish("log_density", results)
    publish()
    plot(results)

"""The paper's experiments on the demo model, a trained network, in the host and through the pack's nodes.

    python3 run.py bench paper_experiments

Writes docs/paper_experiments.json after each part, .png in the end, and docs/paper_variation.png. Over an hour of one core.
Parts that the file has from the same weights, settings and code are not run again.
"""

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..nodes import DensityGuidanceSampler, StochasticDetailVariation
from ..nodes.builtin import demo
from ..nodes.host.alignment_run import BOTH, WITH_SCORE, WITHOUT_SCORE, CheckSettings, examine
from ..nodes.host.model_access import path_of
from ..nodes.host.sheet import draw_sheet
from ..testing.demo_runs import Scheduled, band_energy, high_energy, png_bytes
from ..testing.figures import figure
from ..testing.measures import predicted_bits
from .pages import DOCS, digest, publish, still_true
from .tables import FEW_QUANTILES, sem

SEEDS, FEWER_SEEDS = 14, 7  # two of every class, and one
STEPS = EVALUATIONS = 32
ALIGNMENT_STEPS = 30  # fewer may give wrong numbers
QUANTILES = (0.05, 0.1, 0.3, 0.5, 0.7)  # what twice the steps and evaluations confirm
STRENGTH = 1.0  # of the variation
EARLY, LATE = "structure", "fine details"
STEP_COUNTS = (16, 20, 32, 64)
PRECISIONS = {
    "float32": {},
    "float16 weights": {"dtype": torch.float16, "compute_dtype": torch.float32},
    "bfloat16 weights": {"dtype": torch.bfloat16, "compute_dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
}
STARTS, PER_START = 4, 8
RADII = [0.0, 0.06, 0.125, 0.25, 0.5, 1.42]  # of spatial frequency, Nyquist = 1
SETTINGS = {
    "seeds": SEEDS,
    "steps": STEPS,
    "evaluations": EVALUATIONS,
    "alignment_steps": ALIGNMENT_STEPS,
    "strength": STRENGTH,
    "fewer_seeds": FEWER_SEEDS,
    "starts": STARTS,
    "per_start": PER_START,
    "radii": RADII,
}
# what results depend on, beside this file and the weights
CODE = ["dg_core/*.py", "nodes/**/*.py", "testing/demo_runs.py"]


def guided(quantile):
    """The pack's own solver at a quantile."""
    return lambda _: DensityGuidanceSampler.execute(quantile, 0.0, 0.0, 1.0)[0]


def varied(quantile, vary, seed=1):
    return lambda indices: StochasticDetailVariation.execute(
        quantile, 0.0, vary, STRENGTH, 0.0, 1.0, seed, "expected", 1, variation_index=indices
    )[0]


def detail(demo, result):
    """PNG size in bytes and energy above half of Nyquist, lists over the seeds."""
    return {
        "png": png_bytes(demo.images(result.samples)).tolist(),
        "high": [float(f"{v:.4g}") for v in high_energy(result.samples)],
    }


def read(demo, sampler, steps=STEPS, evaluations=EVALUATIONS, **arguments):
    """{"bits", "png", "high": lists over the seeds, "bits_error": mean}"""
    result = demo.run(sampler, steps, **arguments)
    bits, errors = demo.bits(result, evaluations)
    found = {"bits": [round(v, 4) for v in bits], "bits_error": float(f"{np.mean(errors):.2g}"), **detail(demo, result)}
    print({key: f"{np.mean(v):.4g}" for key, v in found.items()}, flush=True)
    return found


def control():
    """{method: {quantile: what `read` gives}}"""
    demo, few = Scheduled(SEEDS), Scheduled(FEWER_SEEDS)
    density = {str(q): read(demo, guided(q)) for q in QUANTILES}
    prior = {str(q): density["0.5"] if q == 0.5 else read(demo, guided(0.5), noise=demo.noise(q)) for q in QUANTILES}
    stochastic = {
        f"stochastic, {name} noise": {str(q): read(few, varied(q, vary)) for q in FEW_QUANTILES}
        for name, vary in (("early", EARLY), ("late", LATE))
    }
    return {"prior guidance": prior, "density guidance": density, **stochastic}


def converged():
    """{quantile: what `read` gives for the first seeds, at twice the steps and evaluations}"""
    few = Scheduled(FEWER_SEEDS)
    return {str(q): read(few, guided(q), 2 * STEPS, 2 * EVALUATIONS) for q in QUANTILES}


def predicted():
    """{quantile: bits per dimension that density guidance is predicted to add to those at 0.5}"""
    demo = Scheduled(1)
    path, dim = path_of(demo.model.get_model_object("model_sampling")), demo.latent["samples"].numel()
    return {str(q): predicted_bits(q, dim, path, demo.sigmas(STEPS)) for q in QUANTILES}


def alignment():
    """Cosine of the score alignment of every seed at its end and on the way, and by both methods for the first ones."""

    def cosines(count, method):
        demo, found = Scheduled(count), []
        for part in tqdm(demo.parts(), f"score alignment, {method}"):
            latent = {"samples": demo.latent["samples"][part], "batch_index": part.tolist()}
            with torch.inference_mode():
                found.append(
                    examine(demo.guider(part), demo.source, latent, demo.sigmas(ALIGNMENT_STEPS), CheckSettings(method))
                )
        return found[0].log_snr, {
            way: torch.cat([f.cosines[way] for f in found], 1).double().numpy() for way in found[0].cosines
        }

    log_snr, by = cosines(SEEDS, WITH_SCORE)
    _, two = cosines(FEWER_SEEDS, BOTH)
    profile = by[WITH_SCORE]
    return {
        "log_snr": log_snr,
        "cosine": profile[-1].tolist(),
        "profile": {
            "mean": np.nanmean(profile, 1).tolist(),
            "lowest": np.nanmin(profile, 1).tolist(),
            "highest": np.nanmax(profile, 1).tolist(),
        },
        WITH_SCORE: two[WITH_SCORE][-1].tolist(),
        WITHOUT_SCORE: two[WITHOUT_SCORE][-1].tolist(),
    }


def variation():
    """Energy of the differences between variations of an image, and between seeds, by band of spatial frequency."""
    demo = Scheduled(STARTS * PER_START)
    start = torch.arange(STARTS).repeat_interleave(PER_START)
    demo.classes = demo.classes[start]
    seeds, noise = demo.run(guided(0.5), STEPS).samples, demo.noise(0.5)[::PER_START][start]
    plain = seeds[::PER_START]

    def bands(images):
        """Of groups of images (groups, n, ...)."""
        apart = (images - images.mean(1, keepdim=True)).flatten(0, 1)
        scale = images.shape[1] / (images.shape[1] - 1)
        return [float(scale * band_energy(apart, low, high).mean()) for low, high in zip(RADII, RADII[1:])]

    grouped = lambda images: images.view(STARTS, PER_START, *images.shape[1:])
    rows, sheet = {"another seed": {"bands": bands(grouped(seeds))}}, []
    for vary in (EARLY, LATE):
        result = demo.run(varied(0.5, vary), STEPS, noise)
        rows[vary] = {"bands": bands(grouped(result.samples))}
        shown = torch.cat([plain[:1], result.samples[:5], plain[1:2], result.samples[PER_START : PER_START + 5]])
        sheet += list(demo.images(shown).split(6))
        print(vary, rows[vary]["bands"], flush=True)
    labels = [f"{when}\nnoise" for when in ("early", "late") for _ in range(2)]
    columns = ["none", *(f"variation {i}" for i in range(1, 6))]
    return rows, draw_sheet(sheet, labels, columns, None, 128)


def few_steps():
    """{number of steps: {quantile: measures of detail}}"""
    demo = Scheduled(FEWER_SEEDS)
    return {
        str(n): {str(q): detail(demo, demo.run(guided(q), n)) for q in FEW_QUANTILES} for n in tqdm(STEP_COUNTS, "few steps")
    }


def precision():
    """{precision: {quantile: measures of detail and distance to float32}}"""
    rows, reference = {}, {}
    for name, how in PRECISIONS.items():
        demo, rows[name] = Scheduled(FEWER_SEEDS, **how), {}
        for q in FEW_QUANTILES:
            result = demo.run(guided(q), STEPS)
            reference.setdefault(q, result.samples)
            apart = float((result.samples - reference[q]).square().mean().sqrt())
            rows[name][str(q)] = {**detail(demo, result), "distance": apart}
        print(name, {q: r["distance"] for q, r in rows[name].items()}, flush=True)
    return rows


def plot(results):
    with figure(DOCS / "paper_experiments.png", 1, 3, figsize=(13, 4)) as (_, axes):
        for name, by in results["control"].items():
            axes[0].errorbar(
                [float(q) for q in by],
                [np.mean(r["bits"]) for r in by.values()],
                [sem(r["bits"]) for r in by.values()],
                marker="o",
                capsize=3,
                label=name,
            )
        axes[0].set(xlabel="quantile", ylabel="bits per dimension")
        for q, r in results["control"]["density guidance"].items():
            axes[1].plot(r["bits"], r["png"], ".", label=f"q {q}")
        axes[1].set(xlabel="bits per dimension", ylabel="PNG size, bytes")
        for axis in axes[:2]:
            axis.legend()
        a = results["alignment"]
        axes[2].plot(a["log_snr"], a["profile"]["mean"])
        axes[2].fill_between(a["log_snr"], a["profile"]["lowest"], a["profile"]["highest"], alpha=0.3)
        axes[2].set(xlabel="log-SNR", ylabel="cosine of score alignment, mean and range")


def main():
    torch.set_num_threads(1)
    results = still_true("paper_experiments", CODE, weights=digest([demo.WEIGHTS]), settings=SETTINGS)

    def varied_and_shown():
        rows, sheet = variation()
        Image.fromarray((sheet[0].numpy() * 255).round().astype(np.uint8)).save(DOCS / "paper_variation.png")
        return rows

    parts = {
        "predicted": predicted,
        "control": control,
        "converged": converged,
        "alignment": alignment,
        "variation": varied_and_shown,
        "few_steps": few_steps,
        "precision": precision,
    }
    for name, part in parts.items():
        if name not in results:
            print(f"-- {name}", flush=True)
            results[name] = part()
            publish("paper_experiments", results, indent=None)
    publish()
    plot(results)

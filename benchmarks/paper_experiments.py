"""The paper's experiments on the demo model, a trained network, in the host and through the pack's nodes.

    python3 run.py bench paper_experiments

Needs the pictures of training/demo_pictures.py in .host/data/. Writes docs/paper_experiments.json after each part, in the
end docs/paper_experiments.md and .png and the README's part, and docs/paper_variation.png. About an hour of one core, half of
it on two. Parts that the file has from the same weights, settings and code are not run again.
"""

import hashlib
import json

import matplotlib
import numpy as np
import scipy.stats
import torch
from PIL import Image
from tqdm import tqdm

from ..nodes.host.model_access import path_of
from ..dg_core.control import gain_of, guided_steps, predicted_shift
from ..dg_core.schedule import Schedule
from ..dg_core.units import nats_to_bits_per_dim
from ..launcher.environment import PACK
from ..nodes import StochasticDetailVariation
from ..nodes.builtin import demo
from ..nodes.contact_sheet import draw_sheet
from ..nodes.score_alignment import BOTH, WITH_SCORE, WITHOUT_SCORE, CheckSettings, examine
from ..training.demo_pictures import CLASSES
from . import _rivals
from ..testing.demo_runs import Demo, band_energy, high_energy, png_bytes, require_pictures

DOCS = PACK / "docs"
SEEDS, STEPS, LEVELS = 64, 16, 8
ALIGNMENT_STEPS = 30  # fewer may give wrong numbers
QUANTILES, FEW_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9), (0.1, 0.5, 0.9)
STRENGTH = 1.0  # of the variation
EARLY, LATE = "structure", "fine details"
FEWER_SEEDS, BOTH_SEEDS = 32, 16
STEP_COUNTS = (8, 12, 20, 50)
PRECISIONS = {
    "float32": {}, "float16 weights": {"dtype": torch.float16, "compute_dtype": torch.float32},
    "bfloat16 weights": {"dtype": torch.bfloat16, "compute_dtype": torch.float32}, "bfloat16": {"dtype": torch.bfloat16}}
STARTS, PER_START = 8, 8
RADII = [0.0, 0.06, 0.125, 0.25, 0.5, 1.42]  # of spatial frequency, Nyquist = 1
SETTINGS = {
    "seeds": SEEDS, "steps": STEPS, "levels": LEVELS, "alignment_steps": ALIGNMENT_STEPS, "strength": STRENGTH,
    "fewer_seeds": FEWER_SEEDS, "both_seeds": BOTH_SEEDS, "starts": STARTS, "per_start": PER_START, "radii": RADII,
    "held_out_crops": _rivals.HELD_OUT_CROPS, "features": _rivals.FEATURES, "bands": len(_rivals.BANDS) - 1,
    "low": _rivals.LOW, "bootstraps": _rivals.BOOTSTRAPS}
CODE = ["dg_core/*.py", "nodes/*.py", "benchmarks/_*.py"]  # what results depend on, beside this file and the weights
MARKS = ("<!-- by paper_experiments -->", "<!-- end of paper_experiments -->")


def guided(quantile):
    """The pack's own solver at a quantile."""
    return _rivals.guided(0.0, quantile, None)


def varied(quantile, vary, seed=1):
    return lambda indices: StochasticDetailVariation.execute(
        quantile, 0.0, vary, STRENGTH, 0.0, 1.0, seed, "expected", 1, variation_index=indices)[0]


def detail(demo, result):
    """PNG size in bytes and energy above half of Nyquist, lists over the seeds."""
    return {"png": png_bytes(demo.images(result.samples)).tolist(),
            "high": [float(f"{v:.4g}") for v in high_energy(result.samples)]}


def control(seeds=SEEDS, steps=STEPS, levels=LEVELS):
    """{method: {quantile: {"bits", "png", "high": lists over the seeds}}}"""
    demo = Demo(seeds)
    runs = {
        "prior guidance": {q: {"sampler": guided(0.5), "noise": demo.noise(q)} for q in QUANTILES},
        "density guidance": {q: {"sampler": guided(q)} for q in QUANTILES},
        "stochastic, early noise": {q: {"sampler": varied(q, EARLY)} for q in FEW_QUANTILES},
        "stochastic, late noise": {q: {"sampler": varied(q, LATE)} for q in FEW_QUANTILES},
    }
    rows = {name: {} for name in runs}
    for name, by in runs.items():
        for q, arguments in by.items():
            if name == "density guidance" and q == 0.5:  # the same run as that of prior guidance
                rows[name]["0.5"] = rows["prior guidance"]["0.5"]
                continue
            result = demo.run(steps=steps, **arguments)
            bits, errors = demo.bits(result, levels)
            rows[name][str(q)] = {"bits": [round(v, 4) for v in bits], "bits_error": float(f"{np.mean(errors):.2g}"),
                                  **detail(demo, result)}
            print(name, q, {key: f"{np.mean(v):.4g}" for key, v in rows[name][str(q)].items()}, flush=True)
    return rows


def predicted(steps=STEPS):
    """{quantile: bits per dimension that density guidance is predicted to add to those at 0.5}"""
    demo = Demo(1)
    sampling = demo.model.get_model_object("model_sampling")
    log_range = guided_steps(Schedule(path_of(sampling), demo.sigmas(steps).tolist())).log_range
    dim = demo.latent["samples"].numel()
    return {str(q): nats_to_bits_per_dim(predicted_shift(gain_of(q, 0.0, dim, log_range)[0], log_range), dim) for q in QUANTILES}


def alignment(seeds=SEEDS, both=BOTH_SEEDS, steps=ALIGNMENT_STEPS):
    """Cosine of the score alignment of every seed at its end and on the way, and by both methods for the first ones."""
    def cosines(count, method):
        demo, found = Demo(count), []
        for part in tqdm(demo.parts(), f"score alignment, {method}"):
            latent = {"samples": demo.latent["samples"][part], "batch_index": part.tolist()}
            with torch.inference_mode():
                found.append(examine(demo.guider(part), demo.source, latent, demo.sigmas(steps), CheckSettings(method)))
        return found[0].log_snr, {
            way: torch.cat([f.cosines[way] for f in found], 1).double().numpy() for way in found[0].cosines}

    log_snr, by = cosines(seeds, WITH_SCORE)
    _, two = cosines(both, BOTH)
    profile = by[WITH_SCORE]
    return {"log_snr": log_snr, "cosine": profile[-1].tolist(), "profile": {
        "mean": np.nanmean(profile, 1).tolist(), "lowest": np.nanmin(profile, 1).tolist(),
        "highest": np.nanmax(profile, 1).tolist()},
        WITH_SCORE: two[WITH_SCORE][-1].tolist(), WITHOUT_SCORE: two[WITHOUT_SCORE][-1].tolist()}


def variation(starts=STARTS, per_start=PER_START, steps=STEPS):
    """Energy of the differences between variations of a picture, and between seeds, by band of spatial frequency."""
    demo = Demo(starts * per_start)
    start = torch.arange(starts).repeat_interleave(per_start)
    demo.classes = demo.classes[start]
    seeds, noise = demo.run(guided(0.5), steps).samples, demo.noise(0.5)[::per_start][start]
    plain = seeds[::per_start]

    def bands(pictures):
        """Of groups of pictures (groups, n, ...)."""
        apart = (pictures - pictures.mean(1, keepdim=True)).flatten(0, 1)
        scale = pictures.shape[1] / (pictures.shape[1] - 1)
        return [float(scale * band_energy(apart, low, high).mean()) for low, high in zip(RADII, RADII[1:])]

    grouped = lambda pictures: pictures.view(starts, per_start, *pictures.shape[1:])
    rows, sheet = {"another seed": {"bands": bands(grouped(seeds))}}, []
    for vary in (EARLY, LATE):
        result = demo.run(varied(0.5, vary), steps, noise)
        rows[vary] = {"bands": bands(grouped(result.samples))}
        shown = torch.cat([plain[:1], result.samples[:5], plain[1:2], result.samples[per_start:per_start + 5]])
        sheet += list(demo.images(shown).split(6))
        print(vary, rows[vary]["bands"], flush=True)
    labels = [f"{when}\nnoise" for when in ("early", "late") for _ in range(2)]
    columns = ["none", *(f"variation {i}" for i in range(1, 6))]
    return rows, draw_sheet(sheet, labels, columns, None, 128)


def few_steps(seeds=FEWER_SEEDS, counts=STEP_COUNTS):
    """{number of steps: {quantile: measures of detail}}"""
    demo = Demo(seeds)
    return {str(n): {str(q): detail(demo, demo.run(guided(q), n)) for q in FEW_QUANTILES}
            for n in tqdm(counts, "few steps")}


def precision(seeds=BOTH_SEEDS, steps=STEPS):
    """{precision: {quantile: measures of detail and distance to float32}}"""
    rows, reference = {}, {}
    for name, how in PRECISIONS.items():
        demo, rows[name] = Demo(seeds, **how), {}
        for q in FEW_QUANTILES:
            result = demo.run(guided(q), steps)
            reference.setdefault(q, result.samples)
            apart = float((result.samples - reference[q]).square().mean().sqrt())
            rows[name][str(q)] = {**detail(demo, result), "distance": apart}
        print(name, {q: r["distance"] for q, r in rows[name].items()}, flush=True)
    return rows


def in_order(by_quantile, key):
    """Share of the seeds whose measure falls from each of FEW_QUANTILES to the next."""
    values = np.array([by_quantile[str(q)][key] for q in FEW_QUANTILES])
    return float((np.diff(values, axis=0) < 0).all(0).mean())


def _table(head, rows):
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def control_table(results):
    """Mean bits per dimension by method and quantile, and the seeds in order."""
    rows = [[name, *(f"{np.mean(by[str(q)]['bits']):.3f} ± {scipy.stats.sem(by[str(q)]['bits']):.3f}" if str(q) in by else ""
                     for q in QUANTILES), f"{in_order(by, 'bits'):.0%}"] for name, by in results["control"].items()]
    middle = np.mean(results["control"]["density guidance"]["0.5"]["bits"])
    rows.append(["density guidance, predicted", *(f"{middle + results['predicted'][str(q)]:.3f}" for q in QUANTILES), ""])
    return _table(["method", *(f"q {q:g}" for q in QUANTILES), "seeds in order"], rows)


def readout_error(results):
    """Mean standard error of one readout, bits per dimension."""
    return np.mean([r["bits_error"] for by in results["control"].values() for r in by.values()])


def within_classes(values, classes=len(CLASSES)):
    """Values of the seeds, (n,), less the mean of each seed's class."""
    values = np.array(values)
    kinds = np.arange(len(values)) % classes
    return values - (np.bincount(kinds, values) / np.bincount(kinds))[kinds]


def correlation_table(results):
    """Correlation of bits per dimension with the measures of detail, over quantiles and, at each, over seeds."""
    rows = []
    for name, by in results["control"].items():
        row = [name]
        for key in ("png", "high"):
            over_seeds = [scipy.stats.pearsonr(within_classes(r["bits"]), within_classes(r[key])).statistic for r in by.values()]
            means = scipy.stats.pearsonr(*([np.mean(r[k]) for r in by.values()] for k in ("bits", key))).statistic
            row += [f"{means:.2f}" if len(by) > 3 else "", f"{min(over_seeds):.2f} to {max(over_seeds):.2f}"]
        rows.append(row)
    return _table(["method", "PNG size: over quantiles", "PNG size: over seeds", "high frequencies: over quantiles",
                   "high frequencies: over seeds"], rows)


def rivals_table(results):
    rows = []
    for name, row in results["rivals"]["rows"].items():
        what = _rivals.RIVALS[name][0] if name in _rivals.RIVALS else ""
        missed = what and abs(row["png"] / results["rivals"]["target"] - 1) > 0.01
        rows.append([name, f"{what} {row['strength']:.4g}" if what else "", f"{row['png']:.0f}" + (
            " (not reached)" if missed else ""), f"{row['spread']:.1%}", f"{row['change_spread']:.1%}",
            f"{row['frechet']:.2f} ± {row['frechet_error']:.2f}", f"{row['composition']:.3f}"])
    return _table(["method", "setting", "PNG bytes", "spread over seeds", "spread of the change", "Frechet distance",
                   "change of composition"], rows)


def variation_table(results):
    names = [f"below {b:g}" if a == 0 else f"above {a:g}" if b > 1 else f"{a:g} to {b:g}" for a, b in zip(RADII, RADII[1:])]
    seeds = np.array(results["variation"]["another seed"]["bands"])
    return _table(["noise", *names], [
        [{EARLY: "early", LATE: "late"}[name], *(f"{v:.2f}" for v in np.sqrt(np.array(r["bands"]) / seeds))]
        for name, r in results["variation"].items() if name in (EARLY, LATE)])


def detail_table(by_run, head, extra=None):
    """PNG size and high frequencies at each quantile, and the seeds in order, for each run."""
    rows = []
    for name, by in by_run.items():
        rows.append([name, *(f"{np.mean(by[str(q)]['png']):.0f}" for q in FEW_QUANTILES), f"{in_order(by, 'png'):.0%}",
                     *(f"{np.mean(by[str(q)]['high']):.2e}" for q in FEW_QUANTILES), f"{in_order(by, 'high'):.0%}",
                     *([extra(by)] if extra else [])])
    return _table([*head[:1], *(f"PNG bytes, q {q:g}" for q in FEW_QUANTILES), "in order",
                   *(f"high frequencies, q {q:g}" for q in FEW_QUANTILES), "in order", *head[1:]], rows)


def response_sentence(results):
    """How much of the log-density's change between q 0.3 and 0.7 guidance itself makes."""
    by, predicted = results["control"]["density guidance"], results["predicted"]
    measured = np.mean(by["0.3"]["bits"]) - np.mean(by["0.7"]["bits"])
    itself = predicted["0.3"] - predicted["0.7"]
    return (f"From q 0.3 to q 0.7 density guidance itself takes {itself:.3f} bits per dimension away, as predicted, and the "
            f"picture loses {measured:.3f}, {measured / itself:.1f} times that: a trained network goes on in the direction in "
            "which a picture was led. Density Target Sampler steers by what it measures on the way.")


def alignment_sentence(results):
    a = results["alignment"]
    cosine, two = np.array(a["cosine"]), np.array([a[WITH_SCORE], a[WITHOUT_SCORE]])
    return (f"Of {len(cosine)} seeds {np.mean(cosine > 0):.0%} have a positive score alignment; cosine {cosine.min():.2f} to "
            f"{cosine.max():.2f}, mean {cosine.mean():.2f}. With and without the score ({two.shape[1]} seeds, one probe) the "
            f"cosines differ by {np.sqrt(np.mean((two[0] - two[1])**2)):.2g} (root mean square), with the same sign in "
            f"{np.mean(np.sign(two[0]) == np.sign(two[1])):.0%}.")


def page(results):
    r, by = results["rivals"], results["settings"]
    features = f"log energy in {by['bands']} bands of spatial frequency, mean and standard deviation of each colour"
    few = detail_table(results["few_steps"], ["steps"])
    exact = detail_table(results["precision"], ["precision", "distance to float32"],
                         lambda rows: f"{np.mean([v['distance'] for v in rows.values()]):.1e}")
    return f"""# The paper's experiments on a trained model

Made by `python3 run.py bench paper_experiments` from [paper_experiments.json](paper_experiments.json): the demo model, \
{by["seeds"]} seeds of all
classes, {by["steps"]} steps of the scheduler karras and the pack's own solver, CFG 1, float32, where nothing else is said. All \
noises
have the norm of quantile 0.5, but for those of score alignment and of prior guidance.

## Log-density against quantile

Mean bits per dimension with standard errors over the seeds, read at the last noise level above zero with one probe at \
{by["levels"]} noise
levels, which leaves each readout a standard error of {readout_error(results):.2g}. In order: seeds whose bits fall from q \
{FEW_QUANTILES[0]:g} to
{FEW_QUANTILES[1]:g} to {FEW_QUANTILES[2]:g}. Noise of strength {by["strength"]:g}, early ("{EARLY}") or late ("{LATE}"). \
Predicted: what guidance itself
adds.

{control_table(results)}

{response_sentence(results)}

## Log-density and detail

Correlation of bits per dimension with the size of the PNG file, and with the energy above half of the Nyquist frequency:
of the means over the quantiles, and over the seeds of one quantile, less the means of their classes (smallest and largest of
the quantiles).

{correlation_table(results)}

## Score alignment

{alignment_sentence(results)}

## Variation

Distance between variations of a picture, by spatial frequency (Nyquist = 1), as a share of that between seeds of a class;
{by["starts"]} pictures, {by["per_start"]} variations each.

{variation_table(results)}

![Variations by early and by late noise](paper_variation.png)

## At the same increase of detail

Every method is set so that the mean PNG size is that of Density Guidance Sampler around euler at quantile \
{r["quantile"]:g}, {r["target"]:.0f} bytes, with as many
model calls; raised CFG therefore has half of the steps. Spread over seeds: standard deviation of the PNG size over its
mean. Spread of the change: the same of the size relative to the unguided run's. Frechet distance to \
{by["held_out_crops"]} crops of the {r["held_out_pictures"]}
held-out pictures in a space of {by["features"]} features ({features}; each
in units of its standard deviation), with the standard deviation of {by["bootstraps"]} bootstraps over the seeds; \
{by["seeds"]} crops of training pictures
are {r["training_frechet"]:.2f} ± {r["training_frechet_error"]:.2f} away. Change of composition: root mean square difference to \
the unguided picture of the same seed
below {by["low"]:g} of the Nyquist frequency, pictures in [-1, 1]; two seeds of a class are {r["seeds_apart"]:.3f} apart. The pack's \
own solver is
compared with itself, unguided.

{rivals_table(results)}

## Few steps

{by["fewer_seeds"]} seeds. In order: seeds whose measure falls with each quantile.

{few}

## Precision

{by["both_seeds"]} seeds. Weights of the named type, computed in float32; "bfloat16" computes in it, too. The file's weights are
float16, so they lose nothing in it. Computing in float16 was not measured.

{exact}

![Log-density, score alignment, and detail against seeds](paper_experiments.png)
"""


def readme_part(results):
    """What the README says of the experiments."""
    seeds = results["settings"]["seeds"]
    return f"""Mean log-density in bits per dimension on the trained demo model, {seeds} seeds, by the method that has the quantile,
and the share of seeds whose bits fall from q {FEW_QUANTILES[0]:g} to {FEW_QUANTILES[1]:g} to {FEW_QUANTILES[2]:g}:

{control_table(results)}

{response_sentence(results)}

{alignment_sentence(results)}

Other ways to the same increase of detail (mean PNG size), with the same seeds and number of model calls; what the columns mean,
and how detail goes with log-density, few steps and precision: [docs/paper_experiments.md](docs/paper_experiments.md), made by
`python3 run.py bench paper_experiments`.

{rivals_table(results)}"""


def renew_readme(results):
    """Put `readme_part` between its marks in the README."""
    path = PACK / "README.md"
    text = path.read_text(encoding="utf-8")
    for mark in MARKS:
        if mark not in text:
            raise ValueError(f"README.md has no {mark}; put both {' and '.join(MARKS)} where the results are to stand")
    before, _, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    path.write_text(f"{before}{MARKS[0]}\n{readme_part(results)}\n{MARKS[1]}{after}", encoding="utf-8")


def plot(results, path):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, by in results["control"].items():
        axes[0].errorbar([float(q) for q in by], [np.mean(r["bits"]) for r in by.values()],
                         [scipy.stats.sem(r["bits"]) for r in by.values()], marker="o", capsize=3, label=name)
    axes[0].set(xlabel="quantile", ylabel="bits per dimension")
    axes[0].legend()
    for q, r in results["control"]["density guidance"].items():
        axes[1].plot(r["bits"], r["png"], ".", label=f"q {q}")
    axes[1].set(xlabel="bits per dimension", ylabel="PNG size, bytes")
    axes[1].legend()
    a = results["alignment"]
    axes[2].plot(a["log_snr"], a["profile"]["mean"])
    axes[2].fill_between(a["log_snr"], a["profile"]["lowest"], a["profile"]["highest"], alpha=0.3)
    axes[2].set(xlabel="log-SNR", ylabel="cosine of score alignment, mean and range")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def digest(paths):
    """SHA-256 of the files' contents."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def main():
    require_pictures()
    path = DOCS / "paper_experiments.json"
    head = {"weights": digest([demo.WEIGHTS]), "settings": SETTINGS,
            "code": digest(sorted(file for pattern in CODE for file in PACK.glob(pattern)))}
    results = json.loads(path.read_text()) if path.is_file() else {}
    if {key: results.get(key) for key in head} != head:
        results = head

    def varied_and_shown():
        rows, sheet = variation()
        Image.fromarray((sheet[0].numpy() * 255).round().astype(np.uint8)).save(DOCS / "paper_variation.png")
        return rows

    parts = {"predicted": predicted, "control": control, "alignment": alignment, "variation": varied_and_shown,
             "rivals": lambda: _rivals.compare(SEEDS, STEPS), "few_steps": few_steps, "precision": precision}
    for name, part in parts.items():
        if name not in results:
            print(f"-- {name}", flush=True)
            results[name] = part()
            path.write_text(json.dumps(results, indent=None) + "\n")
    (DOCS / "paper_experiments.md").write_text(page(results))
    renew_readme(results)
    plot(results, DOCS / "paper_experiments.png")

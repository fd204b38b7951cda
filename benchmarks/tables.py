"""The tables of docs/ and of the README, from docs/*.json; without the host.

A page calls them by marks in its text: `table("variation", "kept")` is `variation_kept` of docs/variation.json.
"""

from math import sqrt
from statistics import correlation, fmean, median, stdev

FEW_QUANTILES = (0.1, 0.5, 0.9)
DEMO_CLASSES = 7  # of the demo model: seed i has class i modulo their number
ALIGNMENT_CALLS = 3  # of the model for each evaluation of velocity and tangent: one, and a two-sided difference
VARIATION_STRENGTHS = (1.0, 2.0, 3.0)  # of the bias of strong noise
OWN = "own solver"
OWN_STATE = ("EasyCache", "LazyCache")  # methods that reuse predictions, so that other states need other calls
RIVAL_SETTINGS = {  # of the other ways to more detail: what sets their strength
    "Density Guidance Sampler, euler": "detail_shift",
    "Density Guidance Sampler, own solver": "detail_shift",
    "Epsilon Scaling": "scaling_factor",
    "TSR": "tsr_k",
    "scaled starting noise": "scale",
    "euler_ancestral, eta": "eta",
    "euler_ancestral, s_noise": "s_noise",
    "raised CFG": "cfg",
}


def markdown(head, rows):
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def sem(values):
    """Standard error of a mean."""
    return stdev(values) / sqrt(len(values))


def rms(values):
    return sqrt(fmean(v * v for v in values))


# --- the exact density ------------------------------------------------------------------------------------------------


def detail_shift_samplers(r):
    ratios = r["measured_over_predicted"]
    return markdown(["sampler", *ratios], [[name, *(f"{by[name]:.2f}" for by in ratios.values())] for name in ratios["eps"]])


def detail_shift_kinds(r):
    def kind(title, chosen):
        ratios = [[by[name] for name in by if chosen(name)] for by in r["measured_over_predicted"].values()]
        return [title, *(" to ".join(dict.fromkeys((f"{min(v):.2f}", f"{max(v):.2f}"))) for v in ratios)]

    noisy = ("ancestral", "sde", "seeds", "sa_solver", "lcm", "ddpm")
    renoises = lambda name: "cfg_pp" in name or "cfgpp" in name
    adds_noise = lambda name: not renoises(name) and any(word in name for word in noisy)
    return markdown(
        ["sampler", *r["measured_over_predicted"]],
        [
            kind("not connected: the own solver", lambda name: name == OWN),
            kind("euler, ddim, deis, uni_pc", lambda name: name in ("euler", "ddim", "deis", "uni_pc")),
            kind("heun, dpm_2", lambda name: name in ("heun", "dpm_2")),
            kind("dpmpp_2m, res_multistep", lambda name: name in ("dpmpp_2m", "res_multistep")),
            kind("all that add noise: ancestral, sde, seeds, sa_solver, lcm, ddpm", adds_noise),
            kind("all `*_cfg_pp`", renoises),
        ],
    )


def detail_shift_schedulers(r):
    errors = r["scheduler_errors"]
    head = ["scheduler", *(f"{p}, {solver}" for p in errors for solver in (OWN, "euler"))]
    return markdown(
        head,
        [[name, *(f"{by[name][solver]:.1e}" for by in errors.values() for solver in (OWN, "euler"))] for name in errors["eps"]],
    )


def detail_shift_mixture(r):
    rows = []
    for model, by_steps in r["mixture"].items():
        for steps, found in by_steps.items():
            middle = found["bits_per_dim"][r["levels"].index(0.5)]
            rows.append(
                [
                    model,
                    steps,
                    *(
                        f"{bits:.3f} ({middle + shift:.3f})" if shift else f"{bits:.3f}"
                        for bits, shift in zip(found["bits_per_dim"], found["predicted_shifts"])
                    ),
                    f"{found['monotone']:.0%}",
                ]
            )
    return markdown(["model", "steps", *(f"q {q:g}" for q in r["levels"]), "seeds in order"], rows)


def log_density_readout(r):
    schemes = r["curves"]["32"]
    return markdown(
        ["evaluations", *schemes],
        [[n, *(f"{by[n]['rms']:.1e}" for by in schemes.values())] for n in next(iter(schemes.values()))],
    )


def log_density_exact(r):
    return markdown(
        ["model, D", "RMS", "median", "90% of images within"],
        [
            [name, f"{e['rms']:.1e}", f"{e['median']:.1e}", f"{e['p90']:.1e}"]
            for name, e in r["at 32"]["exact divergence"].items()
        ],
    )


def log_density_probe(r):
    return markdown(
        ["model", "RMS", "readouts", "within the stated standard error"],
        [[name, f"{e['rms']:.1e}", e["images"], f"{e['covered']:.0%}"] for name, e in r["at 32"]["one probe"].items()],
    )


def log_density_control(r):
    return markdown(
        ["run", "90% of seeds within", "RMS"],
        [[name, f"{e['p90']:.1e}", f"{e['rms']:.1e}"] for name, e in r["control"].items() if "p90" in e],
    )


def log_density_same(r):
    return markdown(
        ["run", "spread", "unguided spread"],
        [[name, f"{e['spread']:.4f}", f"{e['unguided spread']:.4f}"] for name, e in r["control"].items() if "spread" in e],
    )


def score_alignment_solvers(r):
    return markdown(
        ["density", "solver", "evaluations", "model calls", "RMS error", "median"],
        [
            [density, solver, n, ALIGNMENT_CALLS * int(n), f"{error:.1e}", f"{middle:.1e}"]
            for density, solvers in r["solvers"].items()
            for solver, by in solvers.items()
            if solver != "converged to"
            for n, (error, middle) in by.items()
        ],
    )


def score_alignment_host(r):
    return markdown(
        ["model", "steps", "correlation", "bias, standard errors", "bias", "spread", "response within 5%", "its median error"],
        [
            [
                model,
                steps,
                f"{e['correlation']:.4f}",
                f"{e['bias in standard errors']:+.1f}",
                f"{e['bias']:+.2%}",
                f"{e['spread']:.2%}",
                f"{e['response within 5%']:.0%}",
                f"{e['response error, median']:.2%}",
            ]
            for model, by in r["host"].items()
            for steps, e in by.items()
        ],
    )


def score_alignment_memory(r):
    return markdown(
        ["derivatives by", "with score", "without score"],
        [[name, f"{by['with score']:.2f}", f"{by['without score']:.2f}"] for name, by in r["memory"].items()],
    )


def variation_kept(r):
    return markdown(
        ["model", "correction", "model calls", "bias", "spread", "Euler-Maruyama, as many calls: bias", "spread"],
        [
            [
                model,
                correction,
                e["calls"],
                f"{e['bias']:+.1e}",
                f"{e['spread']:.1e}",
                f"{e['euler_maruyama_bias']:+.1e}",
                f"{e['euler_maruyama_spread']:.1e}",
            ]
            for model, by in r["kept"].items()
            for correction, e in by.items()
        ],
    )


def variation_strong(r):
    return markdown(
        ["model", "vary", "correction", *(f"strength {c:g}" for c in VARIATION_STRENGTHS)],
        [
            [model, vary, correction, *(f"{bias:+.1e}" for bias in biases)]
            for model, by in r["strong"].items()
            for vary, rows in by.items()
            for correction, biases in rows.items()
        ],
    )


def variation_samplers(r):
    by_model = r["host_samplers"]
    return markdown(
        ["sampler", *(part for model in by_model for part in (f"{model}: distance", "bias", "spread"))],
        [
            [
                name,
                *(
                    cell
                    for by in by_model.values()
                    for cell in (f"{by[name]['distance']:.3f}", f"{by[name]['bias']:+.1e}", f"{by[name]['spread']:.1e}")
                ),
            ]
            for name in by_model["eps"]
        ],
    )


def variation_presets(r):
    rows = [
        [
            model,
            "another seed, plain sampler" if vary == "seeds" else vary,
            strength,
            f"{e['low']:.3f}",
            f"{e['high']:.3f}",
            f"{e['share_high']:.0%}",
        ]
        for model, by in r["diversity"].items()
        for vary, found in by.items()
        for strength, e in ([("-", found)] if vary == "seeds" else found.items())
    ]
    return markdown(["model", "vary", "strength", "low frequencies", "high frequencies", "share of high"], rows)


def variation_windows(r):
    return markdown(
        ["vary", "eps and v models", "flow models"],
        [[name, *(f"{a:g} to {b:g}" for a, b in by.values())] for name, by in r["windows"].items()],
    )


def variation_ranges(r):
    runs = [(model, run) for model, by in r["out_of_range"].items() for run in by]
    return markdown(
        ["sampler", *(f"{model}, {run}" for model, run in runs)],
        [
            [name, *(r["out_of_range"][model][run][name] for model, run in runs)]
            for name in r["out_of_range"]["eps"][runs[0][1]]
        ],
    )


# --- the demo model ---------------------------------------------------------------------------------------------------


def demo_model_loss(r):
    keys = ("log_snr", "training", "training_error", "held_out", "held_out_error")
    return markdown(
        ["log-SNR", "loss, training images", "loss, held-out images"],
        [[f"{x:.1f}", f"{a:.4f} ± {ae:.4f}", f"{b:.4f} ± {be:.4f}"] for x, a, ae, b, be in zip(*(r["loss"][k] for k in keys))],
    )


def demo_model_nearest(r):
    return markdown(
        ["looked up", "median", "largest"],
        [[name.replace("pictures", "images"), f"{median(v):.2f}", f"{max(v):.2f}"] for name, v in r["nearest"].items()],
    )


def in_order(by_quantile, measure):
    """Share of the seeds whose measure falls from each of FEW_QUANTILES to the next."""
    seeds = zip(*(by_quantile[str(q)][measure] for q in FEW_QUANTILES))
    return fmean(all(b < a for a, b in zip(values, values[1:])) for values in seeds)


def paper_experiments_control(r):
    def cell(by, q):
        return f"{fmean(by[q]['bits']):.3f} ± {sem(by[q]['bits']):.3f}" if q in by else ""

    rows = [[name, *(cell(by, q) for q in r["predicted"]), f"{in_order(by, 'bits'):.0%}"] for name, by in r["control"].items()]
    middle = fmean(r["control"]["density guidance"]["0.5"]["bits"])
    rows.append(["density guidance, predicted", *(f"{middle + shift:.3f}" for shift in r["predicted"].values()), ""])
    return markdown(["method", *(f"q {q}" for q in r["predicted"]), "seeds in order"], rows)


def response(r):
    """From q 0.3 to q 0.7: (bits per dimension that guidance itself takes away, that the image loses)."""
    by = r["control"]["density guidance"]
    return r["predicted"]["0.3"] - r["predicted"]["0.7"], fmean(by["0.3"]["bits"]) - fmean(by["0.7"]["bits"])


def paper_experiments_response(r):
    predicted, measured = response(r)
    return markdown(
        ["bits per dimension, q 0.3 to q 0.7", ""],
        [
            ["predicted: what guidance itself takes away", f"{predicted:.3f}"],
            ["measured: what the image loses", f"{measured:.3f}"],
            ["measured / predicted", f"{measured / predicted:.1f}"],
        ],
    )


def within_classes(values):
    """Values of the seeds, less the mean of each seed's class."""
    means = [fmean(values[kind::DEMO_CLASSES]) for kind in range(DEMO_CLASSES)]
    return [v - means[i % DEMO_CLASSES] for i, v in enumerate(values)]


def paper_experiments_correlation(r):
    rows = []
    for name, by in r["control"].items():
        row = [name]
        for measure in ("png", "high"):
            seeds = [correlation(within_classes(e["bits"]), within_classes(e[measure])) for e in by.values()]
            means = correlation(*([fmean(e[key]) for e in by.values()] for key in ("bits", measure)))
            row += [f"{means:.2f}" if len(by) > 3 else "", f"{min(seeds):.2f} to {max(seeds):.2f}"]
        rows.append(row)
    return markdown(
        [
            "method",
            *(f"{measure}: over {what}" for measure in ("PNG size", "high frequencies") for what in ("quantiles", "seeds")),
        ],
        rows,
    )


def paper_experiments_alignment(r):
    cosine, (one, two) = r["alignment"]["cosine"], (r["alignment"][way] for way in ("with score", "without score"))
    return markdown(
        ["score alignment", ""],
        [
            [f"positive, of {len(cosine)} seeds", f"{fmean(c > 0 for c in cosine):.0%}"],
            ["cosine", f"{min(cosine):.2f} to {max(cosine):.2f}, mean {fmean(cosine):.2f}"],
            [
                f"cosines with and without the score, {len(one)} seeds, one probe, differ by (root mean square)",
                f"{rms([a - b for a, b in zip(one, two)]):.2g}",
            ],
            ["with the same sign", f"{fmean((a > 0) == (b > 0) for a, b in zip(one, two)):.0%}"],
        ],
    )


def paper_experiments_variation(r):
    radii, seeds = r["settings"]["radii"], r["variation"]["another seed"]["bands"]
    head = [f"below {b:g}" if a == 0 else f"above {a:g}" if b > 1 else f"{a:g} to {b:g}" for a, b in zip(radii, radii[1:])]
    return markdown(
        ["noise", *head],
        [
            [when, *(f"{sqrt(v / s):.2f}" for v, s in zip(r["variation"][vary]["bands"], seeds))]
            for when, vary in (("early", "structure"), ("late", "fine details"))
        ],
    )


def paper_experiments_rivals(r):
    rows = []
    for name, e in r["rivals"]["rows"].items():
        setting = RIVAL_SETTINGS.get(name)
        missed = setting and abs(e["png"] / r["rivals"]["target"] - 1) > 0.01
        rows.append(
            [
                name,
                f"{setting} {e['strength']:.4g}" if setting else "",
                f"{e['png']:.0f}" + (" (not reached)" if missed else ""),
                f"{e['spread']:.1%}",
                f"{e['change_spread']:.1%}",
                f"{e['frechet']:.2f} ± {e['frechet_error']:.2f}",
                f"{e['composition']:.3f}",
            ]
        )
    return markdown(
        [
            "method",
            "setting",
            "PNG bytes",
            "spread over seeds",
            "spread of the change",
            "Frechet distance",
            "change of composition",
        ],
        rows,
    )


def _detail(by_run, first, *more):
    """PNG size and high frequencies at each quantile, and the seeds in order, for each run; more: (heading, cell of a run)."""
    measures = (("PNG bytes", "png", ".0f"), ("high frequencies", "high", ".2e"))
    head = [cell for title, *_ in measures for cell in (*(f"{title}, q {q:g}" for q in FEW_QUANTILES), "in order")]
    return markdown(
        [first, *head, *(title for title, _ in more)],
        [
            [
                name,
                *(
                    cell
                    for _, key, form in measures
                    for cell in (*(format(fmean(by[str(q)][key]), form) for q in FEW_QUANTILES), f"{in_order(by, key):.0%}")
                ),
                *(cell(by) for _, cell in more),
            ]
            for name, by in by_run.items()
        ],
    )


def paper_experiments_few_steps(r):
    return _detail(r["few_steps"], "steps")


def paper_experiments_precision(r):
    return _detail(
        r["precision"], "precision", ("distance to float32", lambda by: f"{fmean(e['distance'] for e in by.values()):.1e}")
    )


# --- in ComfyUI -------------------------------------------------------------------------------------------------------


def works(found, own_state=False):
    """Whether every check of what a node did holds; the numbers beside them are no checks."""
    return all(
        value == 0 if key == "calls" else value
        for key, value in found.items()
        if key in ("neutral", "finite", "calls", "same_method") or (key == "same_calls" and not own_state)
    )


def architectures_families(r):
    rows = []
    for family in r["families"].values():
        row = [family["title"], family["class"], " x ".join(map(str, family["latent"]))]
        if "refused" in family:
            rows.append([*row, "refused", "refused", ""])
            continue
        for dtype, nodes in family["runs"].items():
            fine = all(map(works, (*nodes.values(), *family["read"][dtype].values())))
            row.append(f"{max(e['error'] for e in nodes.values()):.0e}" if fine else "fails")
        etas = [eta for nodes in family["runs"].values() for e in nodes.values() for eta in e.get("eta", ())]
        rows.append([*row, f"{min(etas):.4f} to {max(etas):.4f}"])
    return markdown(
        ["family", "class in ComfyUI, sampling", "latent of one image", "fp32", "bf16", f"eta at quantile {r['quantile']:g}"],
        rows,
    )


def composability_methods(r):
    rows = []
    for name, by_node in r["methods"].items():
        cells = []
        for found in ([e for node, e in by_node.items() if node != OWN], [by_node[OWN]] if OWN in by_node else []):
            fine = all(works(e, name in OWN_STATE) for e in found)
            cells.append("" if not found else f"{max(e['error'] for e in found):.0e}" if fine else "fails")
        rows.append([name, *cells])
    return markdown(["method", "largest relative error", OWN], rows)


def robustness_outcomes(r):
    return markdown(
        [f"{r['examples']:,} random runs, {r['minutes']} minutes", "runs"],
        [[name, f"{count:,}"] for name, count in r["outcomes"].items()],
    )


def long_queue_memory(r):
    return markdown(
        ["prompts", "memory after the 30th, MiB", "after the last, MiB", "change"],
        [[r["prompts"], r["mib_when_settled"], r["mib_after_last"], f"{r['growth']:+.1%}"]],
    )


def oldest_host_runs(r):
    return markdown(
        ["ComfyUI", "nodes missing", "prompts of mixed nodes", "templates", "images saved"],
        [[r["comfyui"], len(r["missing_nodes"]), r["prompts"], r["templates"], r["images"]]],
    )


def cost_ratios(r):
    return markdown(
        ["latents", "model", *next(iter(r["runs"].values()))["times"]],
        [
            [name, e["model"], *(f"{t['median']:.3f} ({t['low']:.3f} to {t['high']:.3f})" for t in e["times"].values())]
            for name, e in r["runs"].items()
        ],
    )


# --- the README -------------------------------------------------------------------------------------------------------


def summary(read):
    """The README's one table. read(name): docs/name.json, or None where it is not there."""
    shifts, readout, variation, paper = map(read, ("detail_shift", "log_density", "variation", "paper_experiments"))
    off = max(
        abs(bits - middle - shift)
        for by in shifts["mixture"].values()
        for e in by.values()
        for middle in [e["bits_per_dim"][shifts["levels"].index(0.5)]]
        for bits, shift in zip(e["bits_per_dim"], e["predicted_shifts"])
    )
    ours, *others = variation["host_samplers"]["eps"].values()
    predicted, measured = response(paper)
    levels = paper["control"]["density guidance"]
    lowest = min(levels, key=lambda q: fmean(levels[q]["bits"]))
    rows = [
        [
            "known exactly",
            f"log-density given against asked for, five quantiles, mean of {shifts['seeds']} seeds",
            f"equal within {off:.4f} bits per dimension",
        ],
        [
            "known exactly",
            "Log-Density with 32 evaluations and one probe, RMS error",
            f"{readout['at 32']['one probe']['flow']['rms']:.1e} nats per dimension",
        ],
        [
            "known exactly",
            "variations of one image (eps model): how far their log-densities differ",
            f"{ours['spread']:.1e} nats per dimension; samplers that add noise: {min(e['spread'] for e in others):.1e} or more",
        ],
        [
            "trained demo model",
            "seeds whose bits fall from quantile 0.1 to 0.5 to 0.9",
            f"{in_order(levels, 'bits'):.0%}; but the mean is lowest at {lowest}",
        ],
        ["trained demo model", "change from quantile 0.3 to 0.7", f"{measured / predicted:.1f} times the predicted one"],
    ]
    if cost := read("cost"):
        guided = [e["times"]["guided Euler"]["median"] for e in cost["runs"].values()]
        rows.append(
            [
                "any",
                "guided Euler step against a plain one, with a model that costs nothing",
                f"{min(guided):.2f} to {max(guided):.2f} times",
            ]
        )
    return markdown(["density", "measured", "result"], rows)


def sweeps_killed(r):
    r = r["killed"]
    return markdown(
        [f"{r['prompts']} prompts of mixed nodes, two workers", ""],
        [
            ["killed with kill -9, one after the other", ", ".join(r["killed"])],
            ["prompts that had run when the driver died, and were skipped", r["done_when_driver_died"]],
            ["ids in the table, and different ones", f"{r['in_table']}, {r['ids_in_table']}"],
            ["results that are the same bytes as of one server alone", r["same_bytes"]],
            ["runs that were cut off, and most runs of one prompt", f"{r['cut_off']}, {r['most_runs']}"],
            ["prompts by the node that joined", r["by_joined_node"]],
        ],
    )


def sweeps_throughput(r):
    r = r["throughput"]
    return markdown(
        [
            "prompts",
            "one server's own queue, s",
            "two workers, s",
            "times as fast",
            "workers busy",
            "same bytes",
            "load of the machine",
        ],
        [
            [
                *(r["prompts"], f"{r['queue_s']:.0f}", f"{r['sweep_s']:.0f}", f"{r['ratio']:.2f}", f"{r['busy']:.0%}"),
                *(r["same_bytes"], f"{r['load']:.1f}"),
            ]
        ],
    )


def sweeps_dry(r):
    r = r["dry"]
    growth = [last - first for first, last in r["worker_mib"]]
    return markdown(
        [f"{r['prompts']:,} prompts of {r['sleep_ms']:g} ms, two workers", ""],
        [
            ["time of the driver for each prompt", f"{r['ms_of_driver']:.1f} ms"],
            ["time that a worker loses for each prompt", f"{r['ms_of_worker']:.1f} ms"],
            ["memory of the driver after each thousand, MiB", ", ".join(map(str, r["driver_mib"]))],
            ["growth of a worker after its first tenth, MiB", ", ".join(f"{mib:+d}" for mib in growth)],
            ["100 machines, 10 s for an image: share of the driver that is busy", f"{r['ms_of_driver'] / 100:.0%}"],
            ["... and what each machine loses, on paper", f"{r['ms_of_worker'] / 1e4:.2%}"],
        ],
    )


def sweeps_resumed(r):
    ways = {"folders, as built": "folders", "Ray Data's checkpoint": "checkpoint"}
    return markdown(
        ["400 prompts of a stand-in, the driver dies half-way", "had run, or begun", "need not run again"],
        [[name, r["resumed"][key]["had_run"], r["resumed"][key]["kept"]] for name, key in ways.items()],
    )

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
CONVERGED = ("0.1", "0.3", "0.5", "0.7")  # quantiles of the demo model whose bits stand at more steps


def markdown(head, rows):
    """A table: the head and each row is a text with " | " between its cells, or a list of cells."""
    head, *rows = (row.split(" | ") if isinstance(row, str) else row for row in (head, *rows))
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def filled(template, found, depth=1):
    """A row for each entry of a dict, `depth` levels down: the template with the keys as {0}, {1}, ... and what they lead to
    by its own keys, or as {value}."""
    entries = [((), found)]
    for _ in range(depth):
        entries = [((*keys, key), value) for keys, by in entries for key, value in by.items()]
    return [template.format(*keys, value=e, **(e if isinstance(e, dict) else {})) for keys, e in entries]


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
    kinds = {
        "not connected: the own solver": lambda name: name == OWN,
        "euler, ddim, deis, dpm_2, uni_pc": lambda name: name in ("euler", "ddim", "deis", "dpm_2", "uni_pc"),
        "heun": lambda name: name == "heun",
        "dpmpp_2m, res_multistep": lambda name: name in ("dpmpp_2m", "res_multistep"),
        "all that add noise: ancestral, sde, seeds, sa_solver, lcm, ddpm": adds_noise,
        "all `*_cfg_pp`": renoises,
    }
    return markdown(["sampler", *r["measured_over_predicted"]], [kind(*item) for item in kinds.items()])


def detail_shift_schedulers(r):
    errors = r["scheduler_errors"]
    head = ["scheduler", *(f"{p}, {solver}" for p in errors for solver in (OWN, "euler"))]
    rows = [
        [name, *(f"{by[name][solver]:.1e}" for by in errors.values() for solver in (OWN, "euler"))] for name in errors["eps"]
    ]
    return markdown(head, rows)


def detail_shift_mixture(r):
    def cells(found):
        middle = found["bits_per_dim"][r["levels"].index(0.5)]
        for bits, shift in zip(found["bits_per_dim"], found["predicted_shifts"]):
            yield f"{bits:.3f} ({middle + shift:.3f})" if shift else f"{bits:.3f}"
        yield f"{found['monotone']:.0%}"

    rows = [[model, steps, *cells(e)] for model, by_steps in r["mixture"].items() for steps, e in by_steps.items()]
    return markdown(["model", "steps", *(f"q {q:g}" for q in r["levels"]), "seeds in order"], rows)


def log_density_readout(r):
    schemes = r["curves"]["32"]
    rows = [[n, *(f"{by[n]['rms']:.1e}" for by in schemes.values())] for n in next(iter(schemes.values()))]
    return markdown(["evaluations", *schemes], rows)


def log_density_exact(r):
    rows = filled("{0} | {rms:.1e} | {median:.1e} | {p90:.1e}", r["at 32"]["exact divergence"])
    return markdown("model, D | RMS | median | 90% of images within", rows)


def log_density_probe(r):
    rows = filled("{0} | {rms:.1e} | {images} | {covered:.0%}", r["at 32"]["one probe"])
    return markdown("model | RMS | readouts | within the stated standard error", rows)


def log_density_control(r):
    rows = filled("{0} | {p90:.1e} | {rms:.1e}", {name: e for name, e in r["control"].items() if "p90" in e})
    return markdown("run | 90% of seeds within | RMS", rows)


def log_density_same(r):
    rows = filled("{0} | {spread:.4f} | {unguided spread:.4f}", {name: e for name, e in r["control"].items() if "spread" in e})
    return markdown("run | spread | unguided spread", rows)


def score_alignment_solvers(r):
    rows = [
        f"{density} | {solver} | {n} | {ALIGNMENT_CALLS * int(n)} | {error:.1e} | {middle:.1e}"
        for density, solvers in r["solvers"].items()
        for solver, by in solvers.items()
        if solver != "converged to"
        for n, (error, middle) in by.items()
    ]
    return markdown("density | solver | evaluations | model calls | RMS error | median", rows)


def score_alignment_host(r):
    row = "{0} | {1} | {correlation:.4f} | {bias in standard errors:+.1f} | {bias:+.2%} | {spread:.2%}"
    rows = filled(f"{row} | {{response within 5%:.0%}} | {{response error, median:.2%}}", r["host"], 2)
    return markdown(
        "model | steps | correlation | bias, standard errors | bias | spread | response within 5% | its median error", rows
    )


def score_alignment_memory(r):
    rows = filled("{0} | {with score:.2f} | {without score:.2f}", r["memory"])
    return markdown("derivatives by | with score | without score", rows)


def variation_kept(r):
    row = "{0} | {1} | {calls} | {bias:+.1e} | {spread:.1e} | {euler_maruyama_bias:+.1e} | {euler_maruyama_spread:.1e}"
    head = "model | correction | model calls | bias | spread | Euler-Maruyama, as many calls: bias | spread"
    return markdown(head, filled(row, r["kept"], 2))


def variation_strong(r):
    rows = filled("{0} | {1} | {2} | {value[0]:+.1e} | {value[1]:+.1e} | {value[2]:+.1e}", r["strong"], 3)
    return markdown(["model", "vary", "correction", *(f"strength {c:g}" for c in VARIATION_STRENGTHS)], rows)


def variation_samplers(r):
    models = r["host_samplers"]
    head = " | ".join(["sampler", *(f"{model}: distance | bias | spread" for model in models)])
    row = "{distance:.3f} | {bias:+.1e} | {spread:.1e}"
    return markdown(head, [" | ".join([name, *(row.format(**by[name]) for by in models.values())]) for name in models["eps"]])


def variation_presets(r):
    rows = []
    for model, by in r["diversity"].items():
        for vary, found in by.items():
            title, found = ("another seed, plain sampler", {"-": found}) if vary == "seeds" else (vary, found)
            rows += filled(f"{model} | {title} | {{0}} | {{low:.3f}} | {{high:.3f}} | {{share_high:.0%}}", found)
    return markdown("model | vary | strength | low frequencies | high frequencies | share of high", rows)


def variation_windows(r):
    rows = [[name, *(f"{a:g} to {b:g}" for a, b in by.values())] for name, by in r["windows"].items()]
    return markdown("vary | eps and v models | flow models", rows)


def variation_ranges(r):
    runs = {f"{model}, {run}": e for model, by in r["out_of_range"].items() for run, e in by.items()}
    return markdown(["sampler", *runs], [[name, *(e[name] for e in runs.values())] for name in next(iter(runs.values()))])


# --- the demo model ---------------------------------------------------------------------------------------------------


def demo_model_loss(r):
    loss = zip(*(r["loss"][k] for k in ("log_snr", "training", "training_error", "held_out", "held_out_error")))
    rows = [f"{x:.1f} | {a:.4f} ± {ae:.4f} | {b:.4f} ± {be:.4f}" for x, a, ae, b, be in loss]
    return markdown("log-SNR | loss, training images | loss, held-out images", rows)


def demo_model_nearest(r):
    rows = [f"{name} | {median(v):.2f} | {max(v):.2f}" for name, v in r["nearest"].items()]
    return markdown("looked up | median | largest", rows)


def in_order(by_quantile, measure, quantiles=tuple(map(str, FEW_QUANTILES))):
    """Share of the seeds whose measure falls from each of the quantiles to the next."""
    seeds = zip(*(by_quantile[q][measure] for q in quantiles if q in by_quantile))
    return fmean(all(b < a for a, b in zip(values, values[1:])) for values in seeds)


def paper_experiments_control(r):
    def cell(by, q):
        return f"{fmean(by[q]['bits']):.3f} ± {sem(by[q]['bits']):.3f}" if q in by else ""

    rows = [
        [name, *(cell(by, q) for q in CONVERGED), f"{in_order(by, 'bits', CONVERGED):.0%}"] for name, by in r["control"].items()
    ]
    middle = fmean(r["control"]["density guidance"]["0.5"]["bits"])
    rows.append(["density guidance, predicted", *(f"{middle + r['predicted'][q]:.3f}" for q in CONVERGED), ""])
    return markdown(["method", *(f"q {q}" for q in CONVERGED), "seeds in order"], rows)


def response(r):
    """From q 0.3 to q 0.7: (bits per dimension that guidance itself takes away, that the image loses)."""
    by = r["control"]["density guidance"]
    return r["predicted"]["0.3"] - r["predicted"]["0.7"], fmean(by["0.3"]["bits"]) - fmean(by["0.7"]["bits"])


def paper_experiments_response(r):
    predicted, measured = response(r)
    rows = [
        f"predicted: what guidance itself takes away | {predicted:.3f}",
        f"measured: what the image loses | {measured:.3f}",
        f"measured / predicted | {measured / predicted:.1f}",
    ]
    return markdown(["bits per dimension, q 0.3 to q 0.7", ""], rows)


def within_classes(values):
    """Values of the seeds, less the mean of each seed's class."""
    means = [fmean(values[kind::DEMO_CLASSES]) for kind in range(DEMO_CLASSES)]
    return [v - means[i % DEMO_CLASSES] for i, v in enumerate(values)]


def paper_experiments_correlation(r):
    rows = []
    for name, by in r["control"].items():
        row = [name]
        for measure in ("png", "high"):
            seeds = [
                correlation(within_classes(e["bits"]), within_classes(e[measure])) for q, e in by.items() if q in CONVERGED
            ]
            means = correlation(*([fmean(by[q][key]) for q in CONVERGED if q in by] for key in ("bits", measure)))
            row += [f"{means:.2f}" if len(by) > 3 else "", f"{min(seeds):.2f} to {max(seeds):.2f}"]
        rows.append(row)
    measures = (f"{measure}: over quantiles | {measure}: over seeds" for measure in ("PNG size", "high frequencies"))
    return markdown(" | ".join(["method", *measures]), rows)


def paper_experiments_alignment(r):
    cosine, (one, two) = r["alignment"]["cosine"], (r["alignment"][way] for way in ("with score", "without score"))
    gap = rms([a - b for a, b in zip(one, two)])
    rows = [
        f"positive, of {len(cosine)} seeds | {fmean(c > 0 for c in cosine):.0%}",
        f"cosine | {min(cosine):.2f} to {max(cosine):.2f}, mean {fmean(cosine):.2f}",
        f"cosines with and without the score, {len(one)} seeds, one probe, differ by (root mean square) | {gap:.2g}",
        f"with the same sign | {fmean((a > 0) == (b > 0) for a, b in zip(one, two)):.0%}",
    ]
    return markdown(["score alignment", ""], rows)


def paper_experiments_variation(r):
    radii, seeds = r["settings"]["radii"], r["variation"]["another seed"]["bands"]
    head = [f"below {b:g}" if a == 0 else f"above {a:g}" if b > 1 else f"{a:g} to {b:g}" for a, b in zip(radii, radii[1:])]
    rows = [
        [when, *(f"{sqrt(v / s):.2f}" for v, s in zip(r["variation"][vary]["bands"], seeds))]
        for when, vary in (("early", "structure"), ("late", "fine details"))
    ]
    return markdown(["noise", *head], rows)


def _detail(by_run, first, *more):
    """PNG size and high frequencies at each quantile, and the seeds in order, for each run; more: (heading, cell of a run)."""
    measures = (("PNG bytes", "png", ".0f"), ("high frequencies", "high", ".2e"))
    head = [cell for title, *_ in measures for cell in (*(f"{title}, q {q:g}" for q in FEW_QUANTILES), "in order")]
    rows = []
    for name, by in by_run.items():
        row = [name]
        for _, key, form in measures:
            row += [*(format(fmean(by[str(q)][key]), form) for q in FEW_QUANTILES), f"{in_order(by, key):.0%}"]
        rows.append([*row, *(cell(by) for _, cell in more)])
    return markdown([first, *head, *(title for title, _ in more)], rows)


def paper_experiments_few_steps(r):
    return _detail(r["few_steps"], "steps")


def paper_experiments_precision(r):
    distance = lambda by: f"{fmean(e['distance'] for e in by.values()):.1e}"
    return _detail(r["precision"], "precision", ("distance to float32", distance))


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
    eta = f"eta at quantile {r['quantile']:g}"
    return markdown(f"family | class in ComfyUI, sampling | latent of one image | fp32 | bf16 | {eta}", rows)


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
    head = [f"{r['examples']:,} random runs, {r['minutes']} minutes", "runs"]
    return markdown(head, filled("{0} | {value:,}", r["outcomes"]))


def long_queue_memory(r):
    row = "{prompts} | {mib_when_settled} | {mib_after_last} | {growth:+.1%}".format(**r)
    return markdown("prompts | memory after the 30th, MiB | after the last, MiB | change", [row])


def oldest_host_runs(r):
    row = [r["comfyui"], len(r["missing_nodes"]), r["prompts"], r["templates"], r["images"]]
    return markdown("ComfyUI | nodes missing | prompts of mixed nodes | templates | images saved", [row])


def cost_ratios(r):
    rows = [
        [name, e["model"], *("{median:.3f} ({low:.3f} to {high:.3f})".format(**t) for t in e["times"].values())]
        for name, e in r["runs"].items()
    ]
    return markdown(["latents", "model", *next(iter(r["runs"].values()))["times"]], rows)


# --- the README -------------------------------------------------------------------------------------------------------


def summary(read):
    """The README's one table. read(name): docs/name.json, or None where it is not there."""
    shifts, readout, variation, paper, cost = map(
        read, ("detail_shift", "log_density", "variation", "paper_experiments", "cost")
    )
    off = max(
        abs(bits - e["bits_per_dim"][shifts["levels"].index(0.5)] - shift)
        for by in shifts["mixture"].values()
        for e in by.values()
        for bits, shift in zip(e["bits_per_dim"], e["predicted_shifts"])
    )
    ours, *others = (e["spread"] for e in variation["host_samplers"]["eps"].values())
    predicted, measured = response(paper)
    levels = paper["control"]["density guidance"]
    asked = f"log-density given against asked for, five quantiles, mean of {shifts['seeds']} seeds"
    varied = "variations of one image (eps model): how far their log-densities differ"
    rows = [
        f"known exactly | {asked} | equal within {off:.4f} bits per dimension",
        "known exactly | Log-Density with 32 evaluations and one probe, RMS error | "
        f"{readout['at 32']['one probe']['flow']['rms']:.1e} nats per dimension",
        f"known exactly | {varied} | {ours:.1e} nats per dimension; samplers that add noise: {min(others):.1e} or more",
        f"trained demo model | seeds whose bits fall with each quantile: {', '.join(CONVERGED)} | "
        f"{in_order(levels, 'bits', CONVERGED):.0%}",
        f"trained demo model | change from quantile 0.3 to 0.7 | {measured / predicted:.1f} times the predicted one",
    ]
    if cost:
        guided = [e["times"]["guided Euler"]["median"] for e in cost["runs"].values()]
        step = "guided Euler step against a plain one, with a model that costs nothing"
        rows.append(f"any | {step} | {min(guided):.2f} to {max(guided):.2f} times")
    return markdown("density | measured | result", rows)


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

"""The pages are what their marks make of the json, and numbers in their text are the measured ones."""

import importlib
import json
import math
import re

import pytest
from density_guidance.benchmarks import (
    composability,
    long_queue,
    pages,
    paper_experiments,
    robustness,
    sweeps,
    tables,
    variation,
)
from density_guidance.benchmarks import detail_shift as samplers
from density_guidance.benchmarks.mutations import MUTATIONS
from density_guidance.dg_core.variation import CORRECTIONS
from density_guidance.nodes.builtin.demo import WEIGHTS
from density_guidance.testing import tiny_models
from density_guidance.testing.applied import APPLIED, STEERING
from density_guidance.training.demo_images import CLASSES
from safetensors import safe_open

PAGES = {path.stem: path for path in (pages.PACK / "README.md", *sorted(pages.DOCS.glob("*.md")))}
MEASURED = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in pages.DOCS.glob("*.json")}


def text(page):
    return PAGES[page].read_text(encoding="utf-8")


@pytest.mark.parametrize("path", pages.pages(), ids=lambda path: path.stem)
def test_rendering_changes_nothing(path):
    assert pages.render(path) == path.read_text(encoding="utf-8"), "run: python3 run.py bench pages"


def test_every_table_and_every_json_stands_in_a_page():
    marks = re.findall(r'\[\[\[cog table\("(\w+)", "(\w+)"\)', "".join(map(text, PAGES)))
    makers = {name for name in vars(tables) if name.startswith(tuple(f"{page}_" for page in (*MEASURED, "cost", "sweeps")))}
    assert {"_".join(mark) for mark in marks} == makers
    assert {name for name, _ in marks} >= set(MEASURED)


@pytest.mark.parametrize("name", sorted(path.stem for path in (pages.PACK / "benchmarks").glob("[a-z]*.py")))
def test_every_benchmark_can_be_imported(name):
    importlib.import_module(f"density_guidance.benchmarks.{name}")


def test_every_mutation_finds_its_text():
    assert [
        before for file, before, *_ in MUTATIONS if (pages.PACK / file).read_text(encoding="utf-8").count(before) != 1
    ] == []


def test_no_text_of_a_page_stands_in_a_benchmark():
    assert not [path.name for path in (pages.PACK / "benchmarks").glob("*.py") if 'f"""' in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_and_links_to_is_there(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text(page))
    assert [link for link in links if not (PAGES[page].parent / link).is_file()] == []
    assert page != "README" or len(links) > 10


def test_the_readme_is_short():
    assert len(text("README").splitlines()) <= 90


# --- numbers ---------------------------------------------------------------------------------------------------------

r = MEASURED
SETTINGS = r["paper_experiments"]["settings"]
TRAINING = r["demo_model"]["training"]
STRUCTURE = [
    by["structure"][str(c)]["low"] / by["seeds"]["low"]
    for by in r["variation"]["diversity"].values()
    for c in variation.STRENGTHS
    if c >= 1
]
READOUTS = [e["bits_error"] for by in r["paper_experiments"]["control"].values() for e in by.values()]
CALLS = {c: e["calls"] for c, e in r["variation"]["kept"]["eps"].items()}
CLAIMS = [  # page, words of its text
    ("architectures", f"sampled with {r['architectures']['steps']} Euler steps"),
    (
        "composability",
        f"{r['composability']['steps']} steps, CFG {r['composability']['cfg']:g}, quantile {r['composability']['quantile']:g}",
    ),
    ("composability", f"differ from one run by {r['composability']['two_stages']:.0e} of the largest number"),
    (
        "demo_model",
        f"--config {TRAINING['config']['name']}` trained it: {TRAINING['parameters'] / 1e6:.1f} million parameters, "
        f"{TRAINING['config']['steps']} steps of {TRAINING['config']['batch']} images, "
        f"{TRAINING['seconds'] / 60:.0f} minutes",
    ),
    ("demo_model", f"The loss at the end of the training is {TRAINING['loss'][-1][1]:.4f}"),
    ("demo_model", f"the {r['demo_model']['held_out_images']} images held out"),
    ("demo_model", f"For {r['demo_model']['queries']} images of each kind"),
    ("demo_model", f"any crop of the {r['demo_model']['training_images']} training images"),
    ("detail_shift", f"quantile {r['detail_shift']['quantile']:g} against 0.5, {r['detail_shift']['steps']} steps"),
    ("detail_shift", f"nats per dimension: {r['detail_shift']['accuracy_steps']} steps"),
    ("detail_shift", f"bits per dimension over {r['detail_shift']['seeds']} seeds"),
    (
        "how_to_choose",
        f"8 steps the demo model still keeps the order of levels in "
        f"{tables.in_order(r['paper_experiments']['few_steps']['8'], 'png'):.0%} of the seeds",
    ),
    (
        "how_to_choose",
        f"for {CALLS['hutchinson'] - CALLS['expected']} and {CALLS['exact'] - CALLS['expected']} calls more in a "
        f"run of {CALLS['expected']}",
    ),
    ("paper_experiments", f"{SETTINGS['seeds']} seeds of all classes, {SETTINGS['steps']} steps"),
    (
        "paper_experiments",
        f"one probe at {SETTINGS['levels']} noise levels; the standard error of one readout is "
        f"{sum(READOUTS) / len(READOUTS):.2g}",
    ),
    ("paper_experiments", f"{SETTINGS['starts']} images, {SETTINGS['per_start']} variations each"),
    ("paper_experiments", f"## Few steps {SETTINGS['fewer_seeds']} seeds"),
    ("paper_experiments", f"## Precision {SETTINGS['both_seeds']} seeds"),
    ("robustness", f"{r['long_queue']['prompts']} prompts of mixed nodes"),
    ("robustness", f"ComfyUI {r['oldest_host']['comfyui']} is the oldest"),
    ("variation", f"{r['variation']['steps']} steps of the scheduler `simple`"),
    ("variation", f'"fine details" at strength {r["variation"]["strength"]:g}'),
    ("variation", f"over {r['variation']['variations']} variations of one image"),
    ("variation", f"are {min(STRUCTURE):.0%} to {max(STRUCTURE):.0%} as far apart"),
    ("variation", f"{variation.STIFF_IMAGES} images leave the range at CFG {variation.STIFF_CFG:g}"),
]


@pytest.mark.parametrize("page, words", CLAIMS)
def test_numbers_in_the_text_are_the_measured_ones(page, words):
    assert words in " ".join(text(page).split())


@pytest.mark.parametrize(
    "page, row, column, value",
    [
        ("detail_shift", "deis", "flow", f"{r['detail_shift']['measured_over_predicted']['flow']['deis']:.2f}"),
        ("detail_shift", "beta", "v, euler", f"{r['detail_shift']['scheduler_errors']['v']['beta']['euler']:.1e}"),
        ("log_density", "64", "ours, one probe", f"{r['log_density']['curves']['32']['ours, one probe']['64']['rms']:.1e}"),
        ("variation", "er_sde", "eps: distance", f"{r['variation']['host_samplers']['eps']['er_sde']['distance']:.3f}"),
        ("architectures", "Wan 2.1", "class in ComfyUI, sampling", r["architectures"]["families"]["wan21"]["class"]),
        ("composability", "APG", "own solver", f"{r['composability']['methods']['APG']['own solver']['error']:.0e}"),
    ],
)
def test_tables_say_what_the_json_says(page, row, column, value):
    """A cell of some, looked up by the names of its row and column."""
    head, found = [], []
    for cells in (line.strip("| ").split(" | ") for line in text(page).splitlines() if line.startswith("| ")):
        head = cells if column in cells else head
        if cells[0] == row and column in head and len(cells) == len(head):
            found.append(cells[head.index(column)])
    assert value in found


def test_measurements_are_of_what_is_there_today():
    """Of every family, method and class, and at the settings of the benchmarks."""
    families, methods = r["architectures"], r["composability"]
    assert list(families["families"]) == list(tiny_models.FAMILIES) and families["nodes"] == list(APPLIED)
    for name in (*families["nodes"], *families["readers"]):
        assert name in text("architectures")
    assert list(methods["methods"]) == list(composability.METHODS) and methods["nodes"] == STEERING
    assert tables.OWN_STATE == tuple(n for n, m in composability.METHODS.items() if m.own_state)
    for method in composability.METHODS.values():
        assert tiny_models.FAMILIES[method.family].title.split(" (")[0] in " ".join(text("composability").split())
    assert tables.DEMO_CLASSES == len(CLASSES)
    with safe_open(WEIGHTS, "pt") as weights:  # measured before they were packed, which docs/demo_model.md says
        assert r["paper_experiments"]["weights"] in (paper_experiments.digest([WEIGHTS]), weights.metadata()["packed_from"])
    assert r["robustness"]["examples"] == robustness.EXAMPLES and r["long_queue"]["prompts"] == long_queue.PROMPTS
    assert r["detail_shift"]["seeds"] == samplers.SEEDS and r["variation"]["variations"] == variation.VARIATIONS


def test_the_long_runs_went_well():
    """Every random run is counted; 300 prompts stay within 5% of the memory after the 30th; nothing is missing."""
    assert sum(r["robustness"]["outcomes"].values()) == r["robustness"]["examples"]
    assert abs(r["long_queue"]["growth"]) < 0.05 and r["oldest_host"]["missing_nodes"] == []
    assert not [line for page in ("architectures", "composability") for line in text(page).splitlines() if "| fails |" in line]


def test_nothing_of_a_sweep_is_lost():
    """Whatever is killed: every prompt once in the table, none run more than twice, all as one server alone makes them."""
    for part in (r["sweeps"]["throughput"], r["sweeps"]["killed"]):
        assert part["same_bytes"] == part["prompts"] == sweeps.PROMPTS
    killed, dry, kept = (r["sweeps"][name] for name in ("killed", "dry", "resumed"))
    assert killed["rows_done"] == killed["in_table"] == killed["ids_in_table"] == killed["prompts"]
    assert killed["most_runs"] <= 2 and killed["by_joined_node"] > 0 and len(killed["killed"]) == 4
    assert dry["in_table"] == dry["prompts"] == sweeps.DRY and dry["driver_mib"][-1] < 1.1 * dry["driver_mib"][0]
    assert all(last < 1.1 * first for first, last in dry["worker_mib"])
    assert kept["folders"]["had_run"] - kept["folders"]["kept"] <= sweeps.WORKERS < kept["checkpoint"]["had_run"]


def test_measured_claims_of_variation():
    """What the documents say of it, on the numbers of the long run."""
    results = r["variation"]
    for by_sampler in results["host_samplers"].values():
        ours, *others = by_sampler.values()
        assert ours["spread"] <= min(e["spread"] for e in others) / 5
        assert all(e["distance"] < 1.05 * ours["distance"] for e in others)  # with more noise they would spread more
    for rows in results["diversity"].values():
        seeds, structure = rows["seeds"], rows["structure"]["1.0"]
        assert structure["low"] ** 2 + structure["high"] ** 2 >= (seeds["low"] ** 2 + seeds["high"] ** 2) / 4
        assert rows["fine details"]["0.5"]["share_high"] >= 0.75 and rows["structure"]["0.5"]["share_high"] <= 0.3
        for vary in ("fine details", "structure"):
            sizes = [e["low"] ** 2 + e["high"] ** 2 for c, e in rows[vary].items() if float(c) <= 1]
            assert sizes == sorted(sizes)
    eps, flow = (results["out_of_range"][p] for p in ("eps", "flow"))
    ours = {row: [n for name, n in by.items() if name.split()[0] in CORRECTIONS] for row, by in eps.items()}
    at_strength_3 = [biases[-1] for by in results["strong"].values() for rows in by.values() for biases in rows.values()]
    assert round(max(at_strength_3) / math.log(2), 2) == 0.17  # web/docs/StochasticDetailVariation.md
    assert all(max(counts) == 0 for row, counts in ours.items() if row != "simple 6")
    assert all(n == 0 for name, n in eps["simple 6"].items() if name not in ("dpmpp_2m_sde", "hutchinson 3", "exact 3"))
    assert all(flow[row]["euler"] == variation.STIFF_IMAGES for row in flow if row != "simple 12")


def test_the_demo_model_does_not_repeat_its_training_images():
    """Samples are no nearer to a training crop than images are that it never saw; training crops themselves are."""
    nearest = r["demo_model"]["nearest"]
    found, held_out, training = (sorted(nearest[k]) for k in ("samples", "held-out images", "training images"))
    middle = len(found) // 2
    assert found[middle] < held_out[middle] + 0.1 and max(found[-1], held_out[-1]) < training[middle]

"""Numbers in the documents are the ones that the benchmarks wrote."""

import json
import math
import re

from density_guidance.benchmarks import (
    demo_model,
    detail_shift,
    log_density,
    paper_experiments,
    score_alignment,
    variation,
)
from density_guidance.dg_core.variation import CORRECTIONS
from density_guidance.launcher.environment import PACK
from density_guidance.nodes.builtin.demo import WEIGHTS


def test_what_the_readme_shows_and_links_to_is_there():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (PACK / "README.md").read_text())
    assert len(links) > 5 and [link for link in links if not (PACK / link).is_file()] == []


def test_tables_come_from_the_benchmark():
    results = json.loads((PACK / "docs" / "detail_shift.json").read_text())
    assert (PACK / "docs" / "detail_shift.md").read_text() == detail_shift.page(results)
    readme = (PACK / "README.md").read_text()
    _, _, mixture = detail_shift.tables(results)
    assert mixture in readme
    own = results["measured_over_predicted"]["flow"][detail_shift.OWN]
    assert f"{abs(own - 1):.1%}" in readme


def test_log_density_tables_come_from_the_benchmark():
    results = json.loads((PACK / "docs" / "log_density.json").read_text())
    assert (PACK / "docs" / "log_density.md").read_text() == log_density.page(results)
    assert log_density.readme_table(results) in (PACK / "README.md").read_text()


def test_score_alignment_table_comes_from_the_benchmark():
    results = json.loads((PACK / "docs" / "score_alignment.json").read_text())
    assert (PACK / "docs" / "score_alignment.md").read_text() == score_alignment.page(results)
    assert score_alignment.readme_table(results) in (PACK / "README.md").read_text()


def test_tables_of_variation_come_from_the_benchmark():
    results = json.loads((PACK / "docs" / "variation.json").read_text())
    assert (PACK / "docs" / "variation.md").read_text() == variation.page(results)
    hosts = variation.tables(results)[1]
    assert hosts in (PACK / "README.md").read_text()


def test_measured_claims_of_variation():
    """What the documents say of it, on the numbers of the long run."""
    results = json.loads((PACK / "docs" / "variation.json").read_text())
    for by_sampler in results["host_samplers"].values():
        ours, *others = by_sampler.values()
        assert ours["spread"] <= min(r["spread"] for r in others) / 5
        assert all(r["distance"] < 1.05 * ours["distance"] for r in others)  # with more noise they would spread more
    for rows in results["diversity"].values():
        seeds, structure = rows["seeds"], rows["structure"]["1.0"]
        assert structure["low"] ** 2 + structure["high"] ** 2 >= (seeds["low"] ** 2 + seeds["high"] ** 2) / 4
        assert rows["fine details"]["0.5"]["share_high"] >= 0.75 and rows["structure"]["0.5"]["share_high"] <= 0.3
        for vary in ("fine details", "structure"):
            sizes = [r["low"] ** 2 + r["high"] ** 2 for c, r in rows[vary].items() if float(c) <= 1]
            assert sizes == sorted(sizes)
    eps, flow = (results["out_of_range"][p] for p in ("eps", "flow"))
    ours = {row: [n for name, n in by.items() if name.split()[0] in CORRECTIONS] for row, by in eps.items()}
    at_strength_3 = [biases[-1] for by in results["strong"].values() for rows in by.values() for biases in rows.values()]
    assert round(max(at_strength_3) / math.log(2), 2) == 0.17  # web/docs/StochasticDetailVariation.md
    assert all(max(counts) == 0 for row, counts in ours.items() if row != "simple 6")
    assert all(n == 0 for name, n in eps["simple 6"].items() if name not in ("dpmpp_2m_sde", "hutchinson 3", "exact 3"))
    assert all(flow[row]["euler"] == variation.STIFF_PICTURES for row in flow if row != "simple 12")


def test_pages_of_the_demo_model_come_from_the_benchmarks():
    results = json.loads((PACK / "docs" / "demo_model.json").read_text())
    assert (PACK / "docs" / "demo_model.md").read_text() == demo_model.page(results)
    results = json.loads((PACK / "docs" / "paper_experiments.json").read_text())
    assert results["weights"] == paper_experiments.digest([WEIGHTS])
    assert (PACK / "docs" / "paper_experiments.md").read_text() == paper_experiments.page(results)
    assert paper_experiments.readme_part(results) in (PACK / "README.md").read_text()


def test_the_demo_model_does_not_repeat_its_training_pictures():
    """Samples are no nearer to a training crop than pictures are that it never saw; training crops themselves are."""
    nearest = json.loads((PACK / "docs" / "demo_model.json").read_text())["nearest"]
    samples, held_out, training = (sorted(nearest[k]) for k in ("samples", "held-out pictures", "training pictures"))
    middle = len(samples) // 2
    assert samples[middle] < held_out[middle] + 0.1 and max(samples[-1], held_out[-1]) < training[middle]

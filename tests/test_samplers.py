"""Every sampler, every scheduler, and what the log says about guidance in them."""

import json
import logging
import math
import statistics

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_eps import EpsilonScaling, TemporalScoreRescaling
from density_guidance.launcher.environment import PACK
from density_guidance.nodes.host import steering
from density_guidance.nodes.host.steering import advice
from density_guidance.testing import host_runs as h

SAMPLERS = comfy.samplers.SAMPLER_NAMES
SCHEDULERS = comfy.samplers.SCHEDULER_NAMES
STEPS = 4
NETWORKS = {"EPS": h.noise_of_a_pattern, "FLOW": h.towards_a_pattern}
# Each sampler meets one scheduler in each kind of model, and each scheduler nine samplers or more.
PAIRS = [
    (name, SCHEDULERS[(i + 4 * k) % len(SCHEDULERS)], kind)
    for k, kind in enumerate(NETWORKS)
    for i, name in enumerate(SAMPLERS)
]


@pytest.mark.parametrize("name, scheduler, kind", PAIRS)
def test_every_sampler(name, scheduler, kind):
    """Neutral to the bit, reproducible, finite, and not one model call more. tests/test_host_sampling.py: each kind of them."""
    model, seen = h.recording(h.free_model(kind, NETWORKS[kind]))
    schedule = h.schedule(model, STEPS, scheduler)  # every run of uni_pc writes into it, as it does in a graph
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))

    def run(sampler):
        before = seen.calls
        return h.free_run(model, sampler, schedule, noise), seen.calls - before

    plain, calls = run(h.core_sampler(name))
    assert torch.isfinite(plain).all()
    for settings in ((0.5, 0.0), (0.2, 1.0, 0.001, 0.002)):  # no step starts in the window
        neutral, neutral_calls = run(h.guided_sampler(*settings, sampler=name))
        assert torch.equal(neutral, plain) and neutral_calls == calls
    first, guided_calls = run(h.guided_sampler(0.3, 0.1, sampler=name))
    again, _ = run(h.guided_sampler(0.3, 0.1, sampler=name))
    assert torch.isfinite(first).all() and torch.equal(first, again) and not torch.equal(first, plain)
    assert guided_calls == calls or name == "dpm_adaptive"  # chooses its own steps


@pytest.mark.parametrize("sampler", [None, "euler"], ids=["own", "euler"])
def test_a_schedule_that_rises_by_a_rounding(sampler):
    """uni_pc leaves 0.001 where the schedule ended in 0: with the exponential scheduler 1e-10 above the one before."""
    model = h.free_model("FLOW", h.towards_a_pattern)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    risen = torch.tensor([1.0, 0.1, 0.01, 0.001, 0.001])
    risen[-1] *= 1 + 2**-23
    assert risen[-1] > risen[-2]
    level = torch.tensor([1.0, 0.1, 0.01, 0.001, 0.001])
    a, b = (h.free_run(model, h.guided_sampler(0.3, sampler=sampler), s, noise) for s in (risen, level))
    assert torch.allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match="only descends"):
        h.free_run(model, h.guided_sampler(0.3, sampler=sampler), torch.tensor([1.0, 0.1, 0.10001, 0.0]), noise)


def measured():
    """{sampler: ratios of the measured to the predicted shift, one for each kind of model}, of this host's samplers.

    Those that only a newer host has were not measured for the page's table.
    """
    table = json.loads((PACK / "docs" / "detail_shift.json").read_text())["measured_over_predicted"]
    return {name: [ratios[name] for ratios in table.values()] for name in SAMPLERS if name in table["eps"]}


def test_advice_agrees_with_what_was_measured():
    ratios = measured()
    said = {name: " ".join(advice(name, {})) for name in ratios}
    silent = [r for name in ratios if not said[name] and name != "dpm_adaptive" for r in ratios[name]]
    forget = [r for name in ratios if "forgets" in said[name] for r in ratios[name]]
    renoise = [r for name in ratios if "not guided" in said[name] for r in ratios[name]]
    assert 0.6 < min(silent) and max(silent) < 1.5
    low, *_, high = statistics.quantiles(forget, n=10)
    assert 0.3 <= round(low, 1) and round(statistics.quantiles(forget, n=4)[2], 1) <= 0.5
    assert round(min(renoise), 1) == 0.4 and math.ceil(max(renoise)) == 43
    assert len(silent) + len(forget) + len(renoise) == 3 * (len(ratios) - 1)


@pytest.mark.parametrize(
    "name, word", [("exp_heun_2_x0", None), ("exp_heun_2_x0_sde", "forgets"), ("cfgpp_ud10_ab", "not guided"), ("anew", None)]
)
def test_advice_on_samplers_of_newer_hosts(name, word):
    found = advice(name, {})
    assert len(found) == (word is not None) and all(word in sentence and name in sentence for sentence in found)


def warnings_of(caplog, model, sampler):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        h.sampled(model, sampler, h.schedule(model, 5))
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Density guidance: ")]


@pytest.mark.parametrize(
    "name, word",
    [
        ("euler_cfg_pp", "not guided"),
        ("euler_ancestral", "forgets"),
        ("dpmpp_2m_sde", "forgets"),
        ("lcm", "forgets"),
        ("euler", None),
        ("dpmpp_2m", None),
        (None, None),
    ],
)
def test_one_warning_per_run(caplog, monkeypatch, name, word):
    """By the node and by the model patch; nothing where guidance does nothing."""
    model = h.exact_model("flow")
    monkeypatch.setattr(steering, "LONG_STEP", math.inf)
    found = warnings_of(caplog, model, h.guided_sampler(0.3, sampler=name))
    assert len(found) == (word is not None) and all(word in text and name in text for text in found)
    assert warnings_of(caplog, model, h.guided_sampler(0.5, sampler=name)) == []
    if name:
        assert warnings_of(caplog, h.guided_model(model, 0.3), name) == found


@pytest.mark.parametrize("node, args", [(EpsilonScaling, (1.01,)), (TemporalScoreRescaling, (0.95, 1.0))])
def test_nodes_that_do_a_similar_thing_are_named(caplog, node, args):
    model = h.kept(h.outputs(node, h.exact_model("flow"), *args)[0])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        h.sampled(model, h.guided_sampler(0.3, sampler="euler"), h.schedule(model, 3), h.empty_latent(1))
    found = [r.getMessage() for r in caplog.records if "add up" in r.getMessage()]
    name = node.define_schema().node_id.replace("TemporalScoreRescaling", "Temporal Score")
    assert len(found) == 1 and name in found[0]

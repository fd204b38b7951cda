"""The record of a run: that it costs nothing, and that its numbers are true."""

import json
import math

import pytest
import torch
from density_guidance.dg_core.coordinates import coordinates_of
from density_guidance.nodes import DensityTargetSampler, DensityTrace
from density_guidance.nodes import density_target as dt
from density_guidance.tests import host_runs as h


def traced(model, sampler, sigmas, batch=4, exact=False):
    """(samples, rows, whole record, plot)."""
    guider = h.outputs(h.custom.BasicGuider, model, h.conditioning())[0]
    sampler = h.core_sampler(sampler) if isinstance(sampler, str) else sampler
    output, _, plot, record = h.outputs(
        DensityTrace, h.random_noise(), guider, sampler, sigmas, h.empty_latent(batch), exact)
    record = json.loads(record)
    return output["samples"], record["rows"], record, plot


def exact_at_last_row(model, sampler, sigmas, batch=4):
    """Exact bits per dimension of the state in which the last model call was made; for samplers that look at no schedule."""
    state = h.picture(model, sampler, sigmas[:-1], h.empty_latent(batch))
    s = coordinates_of(model.model.model_sampling).s(float(sigmas[-2]))
    return model.model.density.bits_per_dim(model.model.process_latent_in(state.double()), s)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "own"])
def test_the_picture_and_the_calls_are_those_without_it(sampler):
    model, seen = h.recording(h.exact_model("flow"))
    sampler = h.guided_sampler(0.3) if sampler == "own" else sampler
    sigmas = h.schedule(model, 8)
    plain = h.picture(model, sampler, sigmas, h.empty_latent(4))
    calls = seen.calls
    samples, rows, _, plot = traced(model, sampler, sigmas)
    assert torch.equal(samples, plain) and seen.calls == 2 * calls
    assert len(rows) == 8 and [row["sigma"] for row in rows] == sigmas[:-1].tolist()
    assert plot.ndim == 4 and plot.shape[-1] == 3 and plot.std() > 0


@pytest.mark.parametrize("prediction, scheduler", [("flow", "simple"), ("eps", "karras")])
def test_shift_so_far_is_what_guidance_predicts(prediction, scheduler):
    """Own solver, detail_shift 0.2: the free record against the formula, and no shift without guidance."""
    model = h.exact_model(prediction)
    sigmas = h.schedule(model, 33, scheduler)[:-1]
    _, guided, _, _ = traced(model, h.guided_sampler(0.5, 0.2), sigmas)
    _, plain, _, _ = traced(model, h.guided_sampler(), sigmas)
    first = 1 if prediction == "flow" else 0
    part = math.log(guided[first]["s"] / guided[-1]["s"]) / math.log(
        guided[first]["s"] / coordinates_of(model.model.model_sampling).s(float(sigmas[-1])))
    found = torch.tensor(guided[-1]["shift"]) - torch.tensor(plain[-1]["shift"])
    assert found.tolist() == pytest.approx([0.2 * part] * 4, rel=0.05)
    assert all(abs(v) < 0.02 for v in plain[-1]["shift"])
    assert all(eta < 1 for eta in guided[10]["eta"])


@pytest.mark.parametrize("prediction, scheduler", [("flow", "simple"), ("eps", "karras")])
def test_exact_trace_is_the_exact_density(prediction, scheduler):
    """Decoded: log p tracked with one probe a step, against the exact value of the state."""
    model = h.exact_model(prediction)
    sigmas = h.schedule(model, 33, scheduler)[:-1]
    sampler = h.guided_sampler(0.3)
    _, rows, _, _ = traced(model, sampler, sigmas, 8, exact=True)
    exact = exact_at_last_row(model, sampler, sigmas, 8)
    z = (torch.tensor(rows[-1]["bits_per_dim"]) - exact) / torch.tensor(rows[-1]["standard_error"])
    assert float(z.abs().max()) < 3.5 and 0.2 < float(z.square().mean().sqrt()) < 2


def test_the_free_density_of_an_sde_run_converges():
    """The discretisation error is of first order: four times the steps, a quarter of it."""
    model = h.exact_model("eps")
    errors = []
    for steps in (64, 256):
        sigmas = h.schedule(model, steps, "karras")[:-1]
        _, rows, _, _ = traced(model, "euler_ancestral", sigmas)
        free = torch.tensor(rows[-1]["free_bits_per_dim"])
        errors.append(float((free - exact_at_last_row(model, "euler_ancestral", sigmas)).mean()))
        assert "eta" not in rows[-1] and "bits_per_dim" not in rows[-1]
    assert 0.15 < errors[1] / errors[0] < 0.45
    assert abs(errors[1]) < 0.1


def test_deterministic_runs_have_no_free_density():
    _, rows, _, _ = traced(h.exact_model("eps"), "euler", h.schedule(h.exact_model("eps"), 16, "karras"))
    assert all("free_bits_per_dim" not in row for row in rows)
    assert max(abs(v) for row in rows[1:10] for v in row["noise"]) < 0.1


def test_a_target_sampler_leaves_its_achieved_values():
    model = h.exact_model("flow")
    sigmas = h.schedule(model, 17)[:-1]
    sampler = h.outputs(DensityTargetSampler, dt.SHIFT, 0.2, -1, 0.002, 2, 1)[0]
    samples, rows, record, _ = traced(model, sampler, sigmas, 2)
    s = coordinates_of(model.model.model_sampling).s(float(sigmas[-1]))
    exact = model.model.density.bits_per_dim(model.model.process_latent_in(samples.double()), s)
    told = record["target"]
    assert told["s"] == pytest.approx(s) and 1 <= told["passes"] <= 2
    for i in range(2):
        assert told["achieved"][i] == pytest.approx(told["target"][i], abs=0.002)
        assert told["target"][i] == pytest.approx(told["unguided"][i] + 0.2, abs=1e-6)
        assert abs(told["achieved"][i] - float(exact[i])) < 4 * told["standard_error"][i]
    assert len(rows) == 17

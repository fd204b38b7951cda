"""The record of a run: that it costs nothing, and that its numbers are true."""

import json
import math

import comfy.nested_tensor
import comfy.samplers
import pytest
import torch
from density_guidance.dg_core import record as run_record
from density_guidance.dg_core.schedule import VE
from density_guidance.nodes import DensityTargetSampler, DensityTrace
from density_guidance.nodes.host import target_run as dt
from density_guidance.nodes.host.model_access import path_of
from density_guidance.testing import host_runs as h

pytestmark = pytest.mark.usefixtures("without_plots")


def traced(model, sampler, sigmas, batch=4, exact=False):
    """(samples, rows, whole record, plot)."""
    guider = h.outputs(h.custom.BasicGuider, model, h.conditioning())[0]
    sampler = h.core_sampler(sampler) if isinstance(sampler, str) else sampler
    output, _, plot, record = h.outputs(DensityTrace, h.random_noise(), guider, sampler, sigmas, h.empty_latent(batch), exact)
    record = json.loads(record)
    return output["samples"], record["rows"], record, plot


def exact_at_last_row(model, sampler, sigmas, batch=4):
    """Exact bits per dimension of the state in which the last model call was made; for samplers that look at no schedule."""
    state = h.sampled(model, sampler, sigmas[:-1], h.empty_latent(batch))
    s = path_of(model.model.model_sampling).s(float(sigmas[-2]))
    return model.model.density.bits_per_dim(model.model.process_latent_in(state.double()), s)


def assert_tracked(model, sampler, sigmas):
    """The tracked log-density of 8 images is the exact one, as far as its error says."""
    _, rows, _, _ = traced(model, sampler, sigmas, 8, exact=True)
    z = torch.tensor(rows[-1]["bits_per_dim"]) - exact_at_last_row(model, sampler, sigmas, 8)
    z = z / torch.tensor(rows[-1]["standard_error"])
    assert float(z.abs().max()) < 3.5 and 0.2 < float(z.square().mean().sqrt()) < 2


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "own"])
def test_image_and_calls_are_those_without_it_and_there_is_a_plot(sampler):
    model, seen = h.recording(h.exact_model("flow"))
    sampler = h.guided_sampler(0.3) if sampler == "own" else sampler
    sigmas = h.schedule(model, 8)
    plain = h.sampled(model, sampler, sigmas, h.empty_latent(4))
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
        guided[first]["s"] / path_of(model.model.model_sampling).s(float(sigmas[-1]))
    )
    found = torch.tensor(guided[-1]["shift"]) - torch.tensor(plain[-1]["shift"])
    assert found.tolist() == pytest.approx([0.2 * part] * 4, rel=0.05)
    assert all(abs(v) < 0.02 for v in plain[-1]["shift"])
    assert all(eta < 1 for eta in guided[10]["eta"])


@pytest.mark.parametrize("prediction, scheduler", [("flow", "simple"), ("eps", "karras")])
def test_exact_trace_is_the_exact_density(prediction, scheduler):
    """Decoded: log p tracked with one probe a step, against the exact value of the state."""
    model = h.exact_model(prediction)
    sigmas = h.schedule(model, 33, scheduler)[:-1]
    assert_tracked(model, h.guided_sampler(0.3), sigmas)


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
    s = path_of(model.model.model_sampling).s(float(sigmas[-1]))
    exact = model.model.density.bits_per_dim(model.model.process_latent_in(samples.double()), s)
    told = record["target"]
    assert told["s"] == pytest.approx(s) and 1 <= told["passes"] <= 2
    for i in range(2):
        assert told["achieved"][i] == pytest.approx(told["target"][i], abs=0.002)
        assert told["target"][i] == pytest.approx(told["unguided"][i] + 0.2, abs=1e-6)
        assert abs(told["achieved"][i] - float(exact[i])) < 4 * told["standard_error"][i]
    assert len(rows) == 17


@pytest.mark.parametrize("way", ["sampler", "model"])
def test_exact_trace_of_a_guided_run_is_the_models_density(way):
    """The prediction is guided; the density that is tracked must not be that of the guided prediction, which at this
    quantile is about 20 standard errors away."""
    model = h.exact_model("flow")
    sigmas = h.schedule(model, 33)[:-1]
    guided, sampler = (
        (model, h.guided_sampler(0.1, sampler="euler")) if way == "sampler" else (h.guided_model(model, 0.1), "euler")
    )
    assert_tracked(guided, sampler, sigmas)


def test_a_run_is_guided_again_after_it_was_looked_at():
    model = h.exact_model("flow")
    sigmas, sampler = h.schedule(model, 8), h.guided_sampler(0.3, sampler="euler")
    samples = traced(model, sampler, sigmas, exact=True)[0]
    assert torch.equal(samples, h.sampled(model, sampler, sigmas, h.empty_latent(4)))


@pytest.mark.parametrize("sampler", ["euler", "heun", "ipndm", "deis", "uni_pc"])
def test_rows_are_about_the_states_in_which_the_model_was_called(sampler):
    """Some samplers report the first or the next state in the place of this one."""
    model, seen = h.recording(h.exact_model("eps"))
    sigmas = h.schedule(model, 6)
    _, rows, _, _ = traced(model, sampler, sigmas, 2)
    # the last: heun's second stage visits a noise level before the step that begins there
    last = {round(float(sigma[0]), 4): k for k, sigma in enumerate(seen.sigma)}
    assert len(rows) == 6
    for row in rows:
        k = last[round(row["sigma"], 4)]
        eps = (seen.x[k] - seen.final[k]) / row["sigma"]
        assert row["eps_energy"] == pytest.approx(eps.square().flatten(1).mean(1).tolist(), rel=1e-4)


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_samplers_with_noise_levels_of_their_own_are_refused(name, wrapped):
    model, seen = h.recording(h.exact_model("eps"))
    sampler = h.guided_sampler(0.3, sampler=name) if wrapped else name
    with pytest.raises(ValueError, match=f"sampler is {name}"):
        traced(model, sampler, h.schedule(model, 4))
    assert seen.calls == 0


def test_another_sampler_with_noise_levels_of_its_own_leaves_a_note():
    model = h.exact_model("eps")

    def sample_other(guider, x, sigmas, extra_args, callback, disable):
        for i, sigma in enumerate(sigmas[:-1]):
            denoised = guider(x, 0.5 * sigma * x.new_ones(len(x)), **extra_args)
            callback({"i": i, "x": x, "denoised": denoised})
        return denoised

    _, rows, record, _ = traced(model, comfy.samplers.KSAMPLER(sample_other), h.schedule(model, 4))
    assert rows == [] and "noise levels of its own" in record["note"]


@pytest.mark.parametrize("exact", [False, True])
def test_a_report_before_the_first_call_is_not_recorded(exact):
    model = h.exact_model("eps")

    def sample_other(guider, x, sigmas, extra_args, callback, disable):
        callback({"i": 0, "x": x, "denoised": x})
        for i, sigma in enumerate(sigmas[:-1]):
            denoised = guider(x, sigma * x.new_ones(len(x)), **extra_args)
            callback({"i": i, "x": x, "denoised": denoised})
            x = denoised + (x - denoised) * sigmas[i + 1] / sigma
        return x

    sigmas = h.schedule(model, 4)
    samples, rows, _, _ = traced(model, comfy.samplers.KSAMPLER(sample_other), sigmas, exact=exact)
    expected = traced(model, "euler", sigmas, exact=exact)[1]
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and torch.isfinite(samples).all()
    assert rows[0] == expected[0]


@pytest.mark.parametrize("exact", [False, True])
def test_repeated_and_rising_noise_levels_are_recorded_once(exact):
    model = h.exact_model("eps")
    plain = h.schedule(model, 8)
    sigmas = torch.cat([plain[:3], plain[2:3], plain[2:3] * (1 + 1e-7), plain[3:]])
    rows, expected = (traced(model, "euler", s, exact=exact)[1] for s in (sigmas, plain))
    assert [row["sigma"] for row in rows] == plain[:-1].tolist()
    assert [row["step"] for row in rows] == [0, 1, 2, 5, 6, 7, 8, 9]
    assert rows[-1]["eps_energy"] == pytest.approx(expected[-1]["eps_energy"], rel=1e-3)


@pytest.mark.parametrize(
    "latent, words",
    [
        ({"noise_mask": torch.ones(1, 1, 32, 32)}, "noise mask"),
        ({"samples": comfy.nested_tensor.NestedTensor([torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)])}, "combines video"),
    ],
    ids=["mask", "parts"],
)
def test_what_has_no_density_of_the_whole_image_is_refused(latent, words):
    model, seen = h.recording(h.exact_model("eps"))
    guider = h.outputs(h.custom.BasicGuider, model, h.conditioning())[0]
    with pytest.raises(ValueError, match=words):
        h.outputs(
            DensityTrace,
            h.random_noise(),
            guider,
            h.core_sampler("euler"),
            h.schedule(model, 4),
            {**h.empty_latent(), **latent},
            False,
        )
    assert seen.calls == 0


def test_a_trace_of_a_target_takes_no_extra_calls():
    model, seen = h.recording(h.exact_model("flow"))
    sigmas, calls = h.schedule(model, 6), []
    for exact in (False, True):
        sampler = h.outputs(DensityTargetSampler, dt.SHIFT, 0.2, -1, 0.002, 1, 1)[0]
        traced(model, sampler, sigmas, 2, exact)
        calls.append(seen.calls - sum(calls))
    assert calls[0] == calls[1] > 0


def test_numbers_that_json_has_not_are_null():
    model = h.free_model("FLOW", lambda x, t: x * math.nan)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[None, {}]], [[None, {}]])
    *_, record = h.outputs(
        DensityTrace,
        h.random_noise(),
        guider,
        h.core_sampler("euler"),
        h.schedule(model, 4),
        {"samples": torch.zeros(1, 4, 8, 8)},
        False,
    )
    rows = json.loads(record, parse_constant=pytest.fail)["rows"]
    assert [row["eps_energy"] for row in rows[1:]] == [[None]] * 3


def test_predictions_may_be_overwritten_after_they_were_added():
    """Samplers do that to save memory."""
    rows = []
    for overwrite in (False, True):
        recorded, generator = run_record.RunRecord(VE, 16), torch.Generator().manual_seed(0)
        for sigma in (8.0, 4.0, 2.0, 1.0):
            x, denoised = (torch.randn(1, 16, generator=generator) for _ in range(2))
            recorded.add(sigma * x, denoised, sigma)
            if overwrite:
                denoised.zero_()
        rows.append(recorded.rows())
    assert rows[0] == rows[1]

"""Readout of latents: against the exact model's density, and on real networks in three dtypes."""

import math

import comfy.model_management
import pytest
import torch
from density_guidance.dg_core import log_density as ld
from density_guidance.dg_core.schedule import FLOW, VE
from density_guidance.nodes import LogDensity
from density_guidance.nodes.host import model_access
from density_guidance.nodes.host import readout as node
from density_guidance.nodes.host.model_access import path_of
from density_guidance.testing import host_runs as h
from density_guidance.testing import networks

FLOOR = {"eps": 0.1, "v": 0.1, "flow": 0.05}


pytestmark = pytest.mark.usefixtures("without_plots")


def guider_of(model, positive=None):
    return h.outputs(h.custom.BasicGuider, model, h.conditioning() if positive is None else positive)[0]


def images(prediction, count, size=h.SIZE, seed=5):
    """(LATENT of exact draws at the noise floor, their exact log p in nats)."""
    base = h.exact_model(prediction, size).model
    y = base.density.sample(count, FLOOR[prediction], torch.Generator().manual_seed(seed)).float()
    return {"samples": base.process_latent_out(y)}, base.density.log_prob(y.double(), FLOOR[prediction])


def exact_evaluate(model, density):
    """What a `ProbedModel` sees, with the exact trace: tr Dhat = D + s^2 Laplacian."""

    def evaluate(x, sigma, call):
        denoised = model.predict(x, sigma)
        alpha = model.path.alpha(sigma)
        trace = torch.zeros(len(x), dtype=torch.float64)
        if alpha > 0:
            s = sigma / alpha
            trace = density.dim + s**2 * density.laplacian(x.double() / alpha, s)
        return ld.Evaluation(denoised, trace, torch.zeros_like(trace))

    return evaluate


def exact_readout(prediction, latent, steps, size=h.SIZE):
    """Readout in the host with the exact divergence."""
    model = h.exact_model(prediction, size)
    guider = guider_of(model)
    levels = node.levels_of(guider, latent["samples"], FLOOR[prediction], steps)
    with torch.inference_mode():
        return model_access.run_in_guider(
            guider,
            latent["samples"],
            lambda m: ld.read_log_density(exact_evaluate(m, model.model.density), m.predict, m.x, levels, m.path),
            steps,
            [m_sigma(prediction, s) for s in reversed(levels)],
        )


def m_sigma(prediction, s):
    return path_of(h.exact_model(prediction).model.model_sampling).sigma(s)


def rms(error):
    return float(error.double().square().mean().sqrt())


@pytest.mark.parametrize("prediction, size, bound", [("flow", 32, 1.5e-4), ("eps", 32, 1.5e-4)])
def test_exact_divergence_at_32_evaluations(prediction, size, bound):
    latent, exact = images(prediction, 24 if size == 32 else 6, size)
    readout = exact_readout(prediction, latent, 32, size)
    assert rms(readout.log_prob - exact) / readout.dim < bound
    if prediction == "flow":
        doubled = rms(exact_readout(prediction, latent, 64, size).log_prob - exact) / readout.dim
        assert doubled < 1e-5


def test_any_path_gives_the_same(monkeypatch):
    """Kicks off the flow: their defect is charged at the score."""
    latent, exact = images("flow", 4)
    state = ld._Ascent.state

    def kicked(self, level):
        kick = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(round(1e6 * level.sigma)))
        self._u = self._u + 0.003 * level.sigma * kick
        return state(self, level)

    readout = exact_readout("flow", latent, 96)
    monkeypatch.setattr(ld._Ascent, "state", kicked)
    off = exact_readout("flow", latent, 96)
    assert 1e-4 < rms(torch.stack(off.eps_energy) - torch.stack(readout.eps_energy))
    assert rms(off.log_prob - exact) / off.dim < 3e-4


def test_one_probe_at_32_evaluations():
    """Error of the node's numbers, and how often the stated standard error covers it."""
    size, count, errors, covered = 32, 50, [], []
    for seed in (1, 2):
        latent, exact = images("flow", count, size, seed)  # other images and other probes
        bits, report, _ = h.outputs(LogDensity, guider_of(h.exact_model("flow", size)), latent, 32, 1, seed, FLOOR["flow"])
        dim = latent["samples"][0].numel()
        stated = torch.tensor([float(line.split("±")[1].split()[0]) for line in report.splitlines()[:count]])
        error = torch.tensor(bits, dtype=torch.float64) + exact / (dim * math.log(2))
        errors.append(error * math.log(2))
        covered.append(error.abs() < stated)
    assert rms(torch.cat(errors)) < 2e-3
    assert 0.60 <= float(torch.cat(covered).double().mean()) <= 0.75


def test_more_probes_lower_the_error():
    latent, exact = images("flow", 12)
    guider = guider_of(h.exact_model("flow"))
    levels = node.levels_of(guider, latent["samples"], 0.05, 24)
    with torch.inference_mode():
        one, four = (node.read(guider, latent["samples"], levels, probes, 3)[0] for probes in (1, 4))
    assert 0.4 < float((four.standard_error / one.standard_error).mean()) < 0.6
    assert rms(four.log_prob - exact) < 0.75 * rms(one.log_prob - exact)


def test_a_readout_does_not_depend_on_the_batch():
    latent, _ = images("flow", 3)
    guider = guider_of(h.exact_model("flow"))
    together = h.outputs(LogDensity, guider, latent, 8, 1, 3, 0.05)[0]
    alone = h.outputs(LogDensity, guider, {"samples": latent["samples"][2:], "batch_index": [2]}, 8, 1, 3, 0.05)[0]
    assert together[2] == pytest.approx(alone[0], abs=1e-6)
    assert h.outputs(LogDensity, guider, latent, 8, 1, 4, 0.05)[0] != together


def test_density_guidance_of_the_model_is_left_out():
    """What is read is the density of the model, in the model patch's runs too."""
    latent, _ = images("flow", 2)
    model = h.exact_model("flow")
    plain, guided = (
        h.outputs(LogDensity, guider_of(m), latent, 8, 1, 3, FLOOR["flow"])[0] for m in (model, h.guided_model(model, 0.05))
    )
    assert guided == plain


def test_the_first_evaluation_is_at_noise_levels_of_the_schedule():
    """Patches like context windows find out their step from the noise level, and stop at one that they don't know."""
    model, seen = h.recording(h.exact_model("eps"))
    latent, _ = images("eps", 1)
    h.outputs(LogDensity, guider_of(model), latent, 5, 1, 0, FLOOR["eps"])
    levels = node.levels_of(guider_of(model), latent["samples"], FLOOR["eps"], 5)
    assert {round(float(sigma[0]), 4) for sigma in seen.sigma} == {round(s, 4) for s in levels}


@pytest.mark.parametrize("indices", [[0, 2, 1], [0, 1, 1], [2, 1, 1], [0, 1, 2, 1]], ids=str)
def test_a_track_refuses_to_turn_back(indices):
    track, x = ld.LogDensityTrack(VE, 4), torch.ones(1, 4)
    evaluation = ld.Evaluation(x, torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="only ascend or only descend"):
        for i in indices:
            track.add(x, [1.0, 2.0, 4.0][i], evaluation)


def test_a_probe_is_one_of_y():
    """d x^2 / dy = 2 x alpha at x = alpha y, whatever the signs of the probe."""
    x = torch.randn(1, 8)
    evaluation = ld.ProbedModel(lambda x, sigma: x.square(), FLOW, "forward")(x, 0.75, 0)
    torch.testing.assert_close(evaluation.denoised, x.square())
    torch.testing.assert_close(evaluation.trace, 2 * 0.25 * x.double().sum(1))


def test_error_bars_survive_a_trace_near_zero():
    """The diagonal of the last probe cannot be scaled to a trace a thousand times as large."""
    dim, generator = 64, torch.Generator().manual_seed(0)
    balanced = torch.tensor([1.0, -1.0] * (dim // 2)) + 1e-3
    mixing = 0.3 * torch.randn(dim, dim, generator=generator)
    mixing = (mixing + mixing.T) / 2
    mixing.fill_diagonal_(1.0)
    evaluate = ld.ProbedModel(lambda x, sigma: x * balanced if sigma > 1 else x @ mixing, VE, "forward")
    x = torch.zeros(32, dim)
    evaluate(x, 2.0, 0)
    variance = evaluate(x, 0.5, 1).variance
    exact = 2 * float((mixing - torch.eye(dim)).square().sum())
    assert float(variance.mean()) == pytest.approx(exact, rel=0.15) and float(variance.min()) > 0.4 * exact


# --- real networks -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet_readout():
    latent = {"samples": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))}

    def read(dtype, weights=None):
        guider = guider_of(networks.unet(dtype, weights=weights), networks.unet_conditioning())
        levels = node.levels_of(guider, latent["samples"], 0.05, 8)
        with torch.inference_mode():
            return node.read(guider, latent["samples"], levels, 1, 0)

    return read


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-2)], ids=str)
def test_narrow_networks_read_nearly_the_same(unet_readout, dtype, bound):
    (wide, _), (narrow, how) = unet_readout(torch.float32, dtype), unet_readout(dtype)
    difference = float((narrow.bits_per_dim - wide.bits_per_dim).abs().max())
    assert 0 < difference < bound
    assert str(dtype).removeprefix("torch.") in how[1] and "float32" in how[1]
    stated = float(how[1].split("least")[1].split()[0])
    assert 0.01 * difference < stated < 3 * difference


def test_methods_read_the_same(monkeypatch, unet_readout):
    forward, how = unet_readout(torch.float32)
    assert "forward-mode" in how[0]
    monkeypatch.setattr(model_access.divergence, "method_of", lambda *_: ("differences", "two-sided differences: as asked"))
    differences, how = unet_readout(torch.float32)
    assert "differences" in how[0]
    traces = torch.stack(forward.traces)
    assert float((torch.stack(differences.traces) - traces).abs().max() / forward.dim) < 0.01
    assert float((differences.bits_per_dim - forward.bits_per_dim).abs().max()) < 0.01


def test_a_readout_does_not_depend_on_what_ran_before():
    """The way to take derivatives is found out anew, by the readout's own seed."""
    guider, latent = guider_of(networks.unet(), networks.unet_conditioning()), {"samples": torch.ones(1, 4, 16, 16)}
    reports = [h.outputs(LogDensity, guider, latent, 2, 1, seed, 0.05)[1] for seed in (0, 1, 0)]
    assert reports[0] == reports[2] != reports[1] and "divergence by forward-mode AD, which differs" in reports[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_calls_that_are_told_are_those_that_come(monkeypatch, dtype):
    totals = []
    monkeypatch.setattr(
        model_access.latent_preview, "prepare_callback", lambda *_: lambda i, x0, x, total: totals.append((i, total))
    )
    guider = guider_of(networks.unet(dtype), networks.unet_conditioning())
    for _ in range(2):  # without and with knowledge of the method
        totals.clear()
        h.outputs(LogDensity, guider, {"samples": torch.ones(1, 4, 16, 16)}, 3, 2, 0, 0.05)
        assert totals[-1] == (len(totals) - 1, len(totals))


def test_levels_of_a_training_table_are_in_it():
    """SD models round sigma to 1000 levels: the readout asks for those alone, each once."""
    guider = guider_of(networks.unet(), networks.unet_conditioning())
    levels = node.levels_of(guider, torch.ones(1, 4, 16, 16), 0.05, 40)
    table = guider.model_patcher.get_model_object("model_sampling").sigmas.double().tolist()
    assert set(levels) <= set(table) and levels == sorted(set(levels))
    assert levels[-1] == table[-1] and levels[0] == pytest.approx(0.05, rel=0.02)


def test_few_steps_and_broken_models_are_said():
    latent, _ = images("flow", 1)
    report = lambda model, steps: h.outputs(LogDensity, guider_of(model), latent, steps, 1, 0, 0.1)[1]
    few, enough = (report(h.exact_model("flow"), n) for n in (8, 16))
    assert "only 8 noise levels" in few and "only" not in enough
    latent = {"samples": torch.ones(1, 4, 8, 8)}
    assert "NaN or infinity" in report(h.free_model("FLOW", lambda x, t: x * math.nan), 16)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"steps": 1}, ["steps is 1"]),
        ({"steps": 2.7}, ["steps is 2.7", "whole"]),
        ({"probes": 1.5}, ["probes is 1.5", "whole"]),
        ({"probes": 0}, ["probes is 0"]),
        ({"noise_floor": 0.05}, ["noise_floor is 0.05", "0.1", "160"]),
        ({"noise_floor": 160.0}, ["noise_floor is 160"]),
        ({"noise_floor": math.nan}, ["noise_floor is nan"]),
        ({"latent": {"samples": torch.zeros(1, 3, 32, 32)}}, ["latent", "empty"]),
        ({"latent": {"samples": torch.ones(1, 4, 32, 32)}}, ["4 channels", "takes 3"]),
        ({"latent": {"samples": torch.full((1, 3, 32, 32), math.nan)}}, ["NaN"]),
        ({"latent": {"samples": torch.ones(2, 3, 32, 32), "batch_index": [4]}}, ["latent has 2 images", "batch_index for 1"]),
        ({"guider": "text"}, ["guider is a str"]),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_input_is_refused_before_any_call(change, words):
    model, seen = h.recording(h.exact_model("eps"))
    settings = {
        "guider": guider_of(model),
        "latent": {"samples": torch.ones(1, 3, 32, 32)},
        "steps": 4,
        "probes": 1,
        "seed": 0,
        "noise_floor": 0.1,
        **change,
    }
    with pytest.raises(ValueError) as error:
        h.outputs(LogDensity, **settings)
    assert all(word in str(error.value) for word in words)
    assert seen.calls == 0


def test_an_interrupt_ends_a_readout():
    model, seen = h.recording(h.exact_model("eps"))

    def interrupt(args):
        comfy.model_management.interrupt_current_processing()
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        h.outputs(LogDensity, guider_of(model), {"samples": torch.ones(1, 3, h.SIZE, h.SIZE)}, 16, 1, 0, 0.1)
    assert seen.calls == 1

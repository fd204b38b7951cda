"""ScoreAlignmentCheck in the real host: on the exact-density model, on small real networks, and with bad input."""

import math
import re
import sys

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler as custom
from density_guidance.nodes import (
    DensityGuidanceSampler,
    LogDensity,
    PriorGuidanceModel,
    PriorGuidanceScale,
    ScoreAlignmentCheck,
    StochasticDetailVariation,
)
from density_guidance.nodes.builtin import exact
from density_guidance.nodes.host import plots
from density_guidance.nodes.host.alignment_run import CheckSettings, examine
from density_guidance.nodes.host.model_access import path_of
from density_guidance.testing import host_runs as h
from density_guidance.testing import networks
from density_guidance.testing.gaussian_oracle import GaussianOracle
from density_guidance.testing.measures import check, guider, without_forward_mode

WAYS = ("with score", "without score", "finite scale")
COMPONENT = 5


pytestmark = pytest.mark.usefixtures("without_plots")


def read_level(model, sigmas):
    """The schedule down to where alignment is read."""
    level = model.get_model_object("model_sampling").percent_to_sigma(0.95)
    return sigmas[sigmas >= level * (1 - 1e-6)]


# --- the exact-density model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle():
    return GaussianOracle(h.exact_model("flow").model.density, COMPONENT)


@pytest.mark.parametrize("prediction, forward", [("eps", True), ("flow", True), ("flow", False)])
def test_gaussian_closed_form(prediction, forward, oracle):
    model = h.exact_model(prediction)
    path = path_of(model.get_model_object("model_sampling"))
    sigmas = h.schedule(model, 32)
    s = [path.s(float(v)) for v in read_level(model, sigmas)]
    unit = h.random_noise().generate_noise(h.empty_latent()).double()
    moved = oracle.coefficients(unit) + oracle.mean
    if math.isinf(s[0]):
        ratio = (oracle.variance + s[-1] ** 2).sqrt()
        centred = moved
    else:
        ratio = ((oracle.variance + s[-1] ** 2) / (oracle.variance + s[0] ** 2)).sqrt()
        moved = moved * math.hypot(1, s[0])
        centred = moved - oracle.mean
    score, tangent = -centred * ratio / (oracle.variance + s[-1] ** 2), -moved * ratio
    exact = (score * tangent).sum(1)
    cosine = exact / (score.norm(dim=1) * tangent.norm(dim=1))
    bits = 0.01 * exact / (oracle.dim * math.log(2))
    positive = h.conditioning(prediction, COMPONENT)
    for way in WAYS[::2] if prediction == "eps" else WAYS[:2]:
        aligned, found, report, _, _, _, response = check(
            model if forward else without_forward_mode(model), way, positive=positive
        )
        print(prediction, way, [r / float(b) - 1 for r, b in zip(response, bits)], found - float(cosine.min()))
        assert response == pytest.approx(bits.tolist(), rel=1e-2), way
        assert found == pytest.approx(float(cosine.min()), abs=1e-2) and aligned
        assert way == "finite scale" or ("forward-mode AD, which" in report) == forward


def test_response_and_scale_against_the_exact_density():
    """1% more noise, and the scale for a wanted change, sampled by the host in fine steps and read from the exact density."""
    model, batch, steps = h.exact_model("flow"), 8, 32
    cut = read_level(model, h.schedule(model, steps))
    fine = torch.cat([(cut[:-1, None] * (cut[1:] / cut[:-1])[:, None] ** (torch.arange(2) / 2)).flatten(), cut[-1:]])

    def bits(scale):
        noise = h.outputs(PriorGuidanceScale, h.random_noise(), 0.5, scale, False)[0]
        latent = h.sample(model, h.guided_sampler(), fine, h.empty_latent(batch), noise=noise)[0]
        return torch.tensor(exact.read(model, latent["samples"], fine), dtype=torch.float64)

    *_, scale, response = check(model, steps=steps, batch=batch, detail_shift=0.05)
    plain, measured = bits(1.0), bits(1.005) - bits(0.995)
    error = (torch.tensor(response) / measured - 1).abs()
    print("response", error.tolist(), "shift", (bits(scale) - plain).tolist())
    assert (error < 0.05).sum() >= 7
    assert float((bits(scale) - plain).mean()) == pytest.approx(0.05, rel=0.05)


def test_an_empty_latent_is_fitted_as_the_host_fits_it_for_a_sampler(monkeypatch):
    """Newer hosts note how far a latent is downscaled, and resize an empty one to the model's own ratio."""
    seen = []

    def fit(model, latent_image, downscale_ratio_spacial=None, downscale_ratio_temporal=None):
        seen.append((downscale_ratio_spacial, downscale_ratio_temporal))
        return latent_image[..., ::2, ::2] if downscale_ratio_spacial == 8 else latent_image

    model = h.exact_model("flow")
    latent = {**h.empty_latent(1, 2 * h.SIZE), "downscale_ratio_spacial": 8, "batch_index": [3]}
    run = guider(model), h.random_noise(), latent, h.schedule(model, 4), "with score", 0.95, 1, 0
    wanted = h.outputs(ScoreAlignmentCheck, *run[:2], {**h.empty_latent(1), "batch_index": [3]}, *run[3:])[4]
    monkeypatch.setattr(comfy.sample, "fix_empty_latent_channels", fit)
    found = h.outputs(ScoreAlignmentCheck, *run)[4]
    assert seen[0] == (8, None) and torch.equal(found["samples"], wanted["samples"]) and found.keys() == wanted.keys()


def test_both_ways_agree():
    """Over 16 seeds, with one probe: correlated, and without a bias; docs/score_alignment.md has more."""
    model = h.exact_model("flow", 32)
    with torch.inference_mode():
        found = examine(guider(model), h.random_noise(), h.empty_latent(16, 32), h.schedule(model, 32), CheckSettings("both"))
    with_score, without = (cosine[-1] for cosine in found.cosines.values())
    amounts = torch.stack([found.alignment, found.alignment * without / with_score])
    bias = amounts[1] - amounts[0]
    correlation = float(torch.corrcoef(amounts)[0, 1])
    print(correlation, float(bias.mean() / (bias.std() / 4)))
    assert correlation > 0.99 and abs(float(bias.mean())) < 3 * float(bias.std()) / 4


def test_the_report_tells_of_both_ways():
    _, cosine, report, *_ = check(h.exact_model("flow", 32), "both", batch=2)
    assert "cosine, with score:" in report and "cosine, without score:" in report
    gap = float(re.search(r"cosines differ by at most ([0-9.]+)", report).group(1))
    assert gap < 0.02 and cosine > 0.3


def test_more_probes_and_other_seeds_agree():
    model = h.exact_model("flow", 32)
    few, other, many = (
        torch.tensor(check(model, "without score", steps=12, batch=1, probes=n, seed=s)[6]) for n, s in ((1, 0), (1, 1), (4, 0))
    )
    assert few != other
    assert many.tolist() == pytest.approx(few.tolist(), rel=0.05)


def test_the_sample_is_a_finished_one():
    """That of the converged flow: 32 of the scheduler's own steps may end at another image."""
    model = h.exact_model("flow")
    latent = check(model)[4]
    converged, other = (h.sampled(model, h.guided_sampler(), h.schedule(model, 64), seed=s) for s in (h.SEED, h.SEED + 1))
    gap, apart = (float((latent["samples"] - v).norm()) for v in (converged, other))
    assert gap < 0.02 * apart
    sampled = h.sampled(model, h.guided_sampler(), h.schedule(model, 32))
    assert torch.equal(check(model, "finite scale")[4]["samples"], sampled)


def test_finite_scale_takes_any_sampler():
    model = h.exact_model("eps")
    wanted = check(model, steps=48, batch=1)[6]
    for name in ("euler", "dpmpp_2m", "uni_pc"):
        response = check(model, "finite scale", steps=48, batch=1, sampler=h.core_sampler(name))[6]
        assert response == pytest.approx(wanted, rel=0.1), name


def test_a_sampler_that_adds_noise_is_named():
    note = "adds noise of its own"
    model = h.exact_model("eps")
    churned, still = (comfy.samplers.ksampler(*a) for a in (("euler", {"s_churn": 1.0}), ("euler_ancestral", {"eta": 0.0})))
    varied = h.outputs(StochasticDetailVariation, 0.5, 0.0, "structure", 1.0, 0.0, 1.0, 5, "expected", 1)[0]
    for name, sampler, stochastic in (
        ("euler_ancestral", None, True),
        ("lcm", None, True),
        ("euler", None, False),
        ("euler", churned, True),
        ("euler", h.guided_sampler(0.4, sampler="euler"), False),
        ("euler", h.outputs(DensityGuidanceSampler, 0.4, 0.0, 0.0, 1.0, churned)[0], True),
        ("euler_ancestral", still, False),
        ("", varied, True),
    ):
        report = check(model, "finite scale", steps=6, batch=1, sampler=sampler or h.core_sampler(name))[2]
        assert (note in report and name in report) == stochastic, (name, report)


def test_a_step_over_the_level_of_end_percent_is_cut():
    """linear_quadratic leads far beyond it at once; alignment is read there all the same."""
    model = h.exact_model("flow")
    sigmas = h.schedule(model, 48, "linear_quadratic")
    level = float(model.get_model_object("model_sampling").percent_to_sigma(0.95))
    sigmas = torch.cat([sigmas[sigmas > 4 * level], sigmas[-1:]])
    report = check(model, sigmas=sigmas)[2]
    assert float(re.search(r"read at sigma ([0-9.]+)", report).group(1)) == pytest.approx(level, rel=1e-3)


def test_caches_of_predictions_are_refused():
    model, seen = h.recording(h.exact_model("flow"))
    for node in ("EasyCache", "LazyCache"):
        cached = h.core_node(node, model=model, reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False)
        for way in ("with score", "without score"):
            h.fails(["carries " + node, "without it"], check, cached, way)
        h.fails(
            ["carries " + node],
            h.outputs,
            LogDensity,
            guider(cached),
            {"samples": torch.ones(1, 3, h.SIZE, h.SIZE)},
            4,
            1,
            0,
            0.1,
        )
    assert seen.calls == 0


# --- what it costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way, forward, each",
    [
        ("with score", True, 1),
        ("with score", False, 3),
        ("without score", True, 3),
        ("without score", False, 5),
        ("both", False, 5),
    ],
)
def test_calls_and_memory(way, forward, each):
    """Never more images at once than the latent has, and as many calls as the report says."""
    model = h.exact_model("flow")
    model, seen = h.recording(model if forward else without_forward_mode(model))
    sigmas = h.schedule(model, 12)
    report = check(model, way, steps=12, batch=3)[2]
    nodes = len(read_level(model, sigmas))
    calls = nodes * each + 12 - nodes
    assert f"cost: {calls} model calls" in report
    assert seen.calls == calls + 4  # those that find out how to take derivatives
    assert {len(x) for x in seen.x} == {3}


def test_an_interrupt_ends_it_at_the_next_call():
    model, seen = h.recording(h.exact_model("flow"))
    model.add_wrapper(
        WrappersMP.APPLY_MODEL,
        lambda executor, *a, **k: (comfy.model_management.interrupt_current_processing(seen.calls == 20), executor(*a, **k))[1],
    )
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        check(model)
    assert seen.calls == 20


# --- one image, one result --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["with score", "without score"])
def test_an_image_is_the_same_alone_and_in_a_batch(way):
    model = h.exact_model("eps")
    together = check(model, way, steps=8, batch=3)
    alone = check(model, way, steps=8, latent={**h.empty_latent(1), "batch_index": [2]})
    assert alone[6] == pytest.approx(together[6][2:], rel=1e-5)
    torch.testing.assert_close(alone[4]["samples"], together[4]["samples"][2:], rtol=1e-4, atol=1e-4)
    assert check(model, way, steps=8, batch=3)[6] == together[6]


@pytest.mark.parametrize("way", ["with score", "finite scale"])
def test_density_guidance_of_the_model_is_left_out(way):
    model = h.exact_model("eps")
    assert check(h.guided_model(model, 0.05), way, steps=8)[6] == check(model, way, steps=8)[6]


def test_noise_is_scaled_after_the_prior_guidance_of_the_model():
    """Which gives it a norm: scaled before, it would come out the same."""
    model = h.exact_model("flow")
    patched = h.outputs(PriorGuidanceModel, model, 0.5, 1.0, True)[0]
    noise = h.outputs(PriorGuidanceScale, h.random_noise(), 0.5, 1.0, True)[0]
    for way in ("with score", "finite scale"):
        response = check(patched, way, steps=24)[6]
        assert response == pytest.approx(check(model, way, steps=24, noise=noise)[6], rel=1e-4) and min(response) > 1e-3


def test_finite_scale_counts_the_calls_of_its_sampler():
    model, seen = h.recording(h.exact_model("eps"))
    report = check(model, "finite scale", steps=8, sampler=h.core_sampler("heun"))[2]
    assert f"cost: {seen.calls} model calls" in report and "plain sampling takes 15" in report


def test_an_image_in_the_latent_does_not_count_as_noise():
    """At maximum noise the host adds the latent to the noise of an eps model; only the noise is scaled."""
    model = h.exact_model("eps")
    latent = {"samples": torch.rand(1, 3, h.SIZE, h.SIZE, generator=torch.Generator().manual_seed(0))}
    finite = check(model, "finite scale", latent=latent, scale_step=0.005)[6]
    assert check(model, latent=latent)[6] == pytest.approx(finite, rel=5e-3)


# --- real networks ----------------------------------------------------------------------------------------------

NETWORKS = {"unet": (networks.unet, networks.unet_conditioning, 4), "dit": (networks.dit, networks.dit_conditioning, 16)}


@pytest.mark.parametrize("name, dtype", [("dit", torch.float32), ("dit", torch.bfloat16)], ids=["dit", "dit in bf16"])
def test_with_score_agrees_with_finite_scale_on_real_networks(name, dtype):
    """On networks that attend, normalise and round, whose eps stands for the score in both."""
    make, positive, channels = NETWORKS[name]
    model = make(dtype)
    latent = {"samples": torch.zeros(2, channels, 8, 8)}
    run = lambda way, model=model, **k: check(model, way, steps=40, positive=positive(), latent=latent, **k)
    by_default = run("with score")
    differences = run("with score", without_forward_mode(model))
    schedule = h.schedule(model, 40)
    cut = read_level(model, schedule)
    quarters = torch.arange(4) / 4  # it keeps to the scheduler's noise levels, which are coarse for random weights
    finer = (cut[:-1, None] + (cut[1:] - cut[:-1])[:, None] * quarters).flatten()
    finite = run(
        "finite scale", sigmas=torch.cat([finer, schedule[len(cut) - 1 :]]), scale_step=0.01 if dtype is torch.float32 else 0.05
    )
    print(name, dtype, by_default[6], differences[6], finite[6], by_default[2].splitlines()[-2:])
    rel = 0.01 if dtype is torch.float32 else 0.1
    assert differences[6] == pytest.approx(by_default[6], rel=rel)
    assert finite[6] == pytest.approx(by_default[6], rel=2 * rel)


def test_without_score_agrees_with_the_density_of_the_flow_on_a_real_network():
    """Random weights are no score of their own flow's density, which is read here at the ends of runs with scaled noise."""
    make, positive, channels = NETWORKS["dit"]
    model, step = make(torch.float32), 0.02
    latent = {"samples": torch.zeros(2, channels, 8, 8)}
    cut = read_level(model, h.schedule(model, 40))
    level = path_of(model.get_model_object("model_sampling")).s(float(cut[-1]))

    def bits(scale):
        noise = h.outputs(PriorGuidanceScale, h.random_noise(), 0.5, scale, False)[0]
        end = h.sample(model, h.guided_sampler(), cut, latent, noise=noise, positive=positive())[0]
        return torch.tensor(h.outputs(LogDensity, guider(model, positive()), end, 32, 2, 0, level)[0], dtype=torch.float64)

    measured = 0.01 * (bits(1 + step) - bits(1 - step)) / (2 * step)
    found = check(model, "without score", steps=40, positive=positive(), latent=latent, probes=2)[6]
    print(found, measured.tolist())
    assert found == pytest.approx(measured.tolist(), rel=0.05)


# --- bad input --------------------------------------------------------------------------------------------------


def test_bad_input_before_any_call():
    model, seen = h.recording(h.exact_model("flow"))
    full = h.schedule(model, 12)
    latent = h.empty_latent()
    cases = [
        (["sigmas begin at", "maximum is 1"], {"sigmas": full[3:]}),
        (["sigmas", "three"], {"sigmas": torch.tensor([1.0, 0.0])}),
        (["sigmas", "descend"], {"sigmas": full.flip(0)}),
        (["sigmas", "finite"], {"sigmas": torch.tensor([1.0, math.nan, 0.0])}),
        (["sigmas", "[]"], {"sigmas": torch.tensor([])}),
        (["sigmas begin at 2", "maximum is 1", "scheduler"], {"sigmas": 2 * full}),
        (["sigmas are of shape (13, 1)"], {"sigmas": full[:, None]}),
        (["sigmas are a str"], {"sigmas": "normal"}),
        (["end_percent is 0.05"], {"end_percent": 0.05}),
        (["end_percent", "nan", "1.0"], {"end_percent": math.nan}),
        (["method is 'fast'", "with score"], {"method": "fast"}),
        (["probes is 0"], {"probes": 0}),
        (["detail_shift is 3"], {"detail_shift": 3}),
        (["scale_step is 0"], {"scale_step": 0}),
        (["sampler is a str", "KSamplerSelect"], {"sampler": "euler"}),
        (["noise is zero", "DisableNoise"], {"noise": h.outputs(custom.DisableNoise)[0]}),
        (["noise is a int", "RandomNoise"], {"noise": 3}),
        (["latent_image has a noise mask"], {"latent": {**latent, "noise_mask": torch.ones(2, h.SIZE, h.SIZE)}}),
        (["NaN"], {"latent": {"samples": latent["samples"] / 0}}),
        (["channels"], {"latent": {"samples": torch.ones(1, 5, h.SIZE, h.SIZE)}}),
        (["latent_image is a dict without samples", "LATENT"], {"latent": {}}),
        (["latent_image is a Tensor"], {"latent": latent["samples"]}),
        (["latent_image has 2 images", "batch_index for 3"], {"latent": {**latent, "batch_index": [0, 1, 2]}}),
        (["seed is None"], {"seed": None}),
        (["end_percent is '0.5'"], {"end_percent": "0.5"}),
    ]
    for words, wrong in cases:
        h.fails(words, check, model, **wrong)
    h.fails(
        ["guider is a int", "GUIDER"], h.outputs, ScoreAlignmentCheck, 3, h.random_noise(), latent, full, "both", 0.95, 1, 0
    )
    assert seen.calls == 0


def test_report_and_plot():
    aligned, cosine, report, plot, latent, scale, response = check(h.exact_model("flow"), "both", steps=20)
    assert aligned is True and 0 < cosine <= 1 and scale > 1
    assert report.startswith("Aligned") and "log-SNR" in report and "model calls" in report
    assert plot.ndim == 4 and plot.shape[-1] == 3 and 0 <= plot.min() < plot.max() <= 1
    assert latent["samples"].shape == (2, 3, h.SIZE, h.SIZE) and len(response) == 2


def test_plot_without_matplotlib(monkeypatch):
    """A white image of the same size."""
    drawn = plots.curves_image({"y": [[0.0], [1.0]]}, "x", [0.0, 1.0])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    white = plots.curves_image({"y": [[0.0], [1.0]]}, "x", [0.0, 1.0])
    assert white.shape == drawn.shape and (white == 1).all() and (drawn < 1).any()

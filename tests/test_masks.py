"""Guidance by region (mask) and by time (curve), in the real host."""

import math

import pytest
import torch
from density_guidance.dg_core.control import guided_steps
from density_guidance.dg_core.schedule import Schedule
from density_guidance.dg_core.units import quantile_to_z
from density_guidance.nodes.builtin import exact
from density_guidance.nodes.host.model_access import path_of
from density_guidance.testing import host_runs as h
from density_guidance.testing import steering, tiny_models

KINDS = pytest.mark.parametrize("prediction", h.KINDS)
NODES = pytest.mark.parametrize("node", ["sampler", "model"])
SIZE = 32  # of images: masks have soft edges
STEPS = 6


pytestmark = pytest.mark.usefixtures("without_plots")


def guided(model, node, quantile, sampler="euler", **more):
    """(model, sampler) with one of the two nodes in it."""
    if node == "model":
        return h.guided_model(model, quantile, **more), h.core_sampler(sampler)
    return model, h.guided_sampler(quantile, sampler=sampler, **more)


def recorded(model, sampler, latent=None, **more):
    """(samples, what was seen, sigmas)."""
    model, seen = h.recording(model)
    sigmas = h.schedule(model, STEPS)
    return h.sampled(model, sampler, sigmas, latent, **more), seen, sigmas.tolist()


MASKS = {
    "larger, soft": h.soft_disc(200),
    "as large": h.soft_disc(SIZE),
    "one per image": torch.cat([h.soft_disc(64, 0.3), h.soft_disc(64, 0.7, radius=0.2)]),
    "weak": 0.4 * torch.ones(1, 8, 8),
    "not square": h.soft_disc(64)[:, ::2],
}


@pytest.mark.parametrize(
    "which, prediction, node",
    [(which, h.KINDS[i % 2], ("sampler", "model")[i // 2 % 2]) for i, which in enumerate(MASKS)]
    + [("as large", "eps", "model")],
)
def test_the_mask_weights_the_guidance_and_its_statistics(prediction, node, which):
    model = h.exact_model(prediction, SIZE)
    result, seen, sigmas = recorded(*guided(model, node, 0.2, mask=MASKS[which]))
    weights = h.resized(MASKS[which], result.shape)
    error, _ = steering.deviation(model, seen, sigmas, 0.2, weights)
    assert error < 1e-4
    outside = weights == 0
    assert all(torch.equal(a[outside], b[outside]) for a, b in zip(seen.denoised, seen.final))


@pytest.mark.parametrize("family", ["wan21", "stable_audio"])
def test_masks_of_video_and_audio(family):
    """Masks are frames of a video, interpolated in time; on audio the height is averaged."""
    frames = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    latent, model = tiny_models.latent(family), h.kept(tiny_models.build(family))
    weights = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 3, 1, 1)
    if family == "stable_audio":
        frames = torch.linspace(0, 2, 8)[None, :, None].clamp(max=1) * torch.linspace(0, 1, 32)[None, None]
        weights = frames.mean(1)
    _, seen, sigmas = recorded(
        model,
        h.guided_sampler(0.2, sampler="euler", mask=frames),
        {"samples": latent},
        positive=tiny_models.conditioning(family, 1),
    )
    assert steering.deviation(model, seen, sigmas, 0.2, weights.expand(latent.shape))[0] < 1e-4


@pytest.mark.parametrize("node, sampler", [("sampler", "euler"), ("sampler", None), ("model", "euler")])
def test_masks_that_change_nothing(node, sampler):
    model = h.exact_model("flow", SIZE)

    def run(quantile, **more):
        return recorded(*guided(model, node, quantile, sampler, **more))[0]

    plain = run(0.5)
    assert torch.equal(run(0.5, mask=h.soft_disc(64)), plain)
    assert torch.equal(run(0.2, mask=torch.zeros(1, 64, 64)), plain)
    whole = run(0.2)
    assert torch.allclose(run(0.2, mask=torch.ones(1, 64, 64)), whole, atol=1e-5) and not torch.equal(whole, plain)
    # An image whose mask is empty is left alone, to the bit.
    one = run(0.2, mask=torch.stack([torch.zeros(8, 8), torch.ones(8, 8)]))
    assert torch.equal(one[0], plain[0]) and torch.allclose(one[1], whole[1], atol=1e-5)


@KINDS
def test_two_regions_by_chaining(prediction):
    """At the first guided step every region is guided as if it were alone; the results differ, region by region."""
    model = h.exact_model(prediction, SIZE)
    left = torch.zeros(1, 32, 32)
    left[..., :16] = 1
    both = h.guided_sampler(0.8, mask=1 - left, sampler=h.guided_sampler(0.1, mask=left, sampler="euler"))
    runs = {
        "both": both,
        "left": h.guided_sampler(0.1, mask=left, sampler="euler"),
        "right": h.guided_sampler(0.8, mask=1 - left, sampler="euler"),
    }
    seen = {name: recorded(model, sampler)[1] for name, sampler in runs.items()}
    first = steering.guided_steps(model, h.schedule(model, STEPS).tolist())[0]
    final = {name: s.final[first] for name, s in seen.items()}
    assert torch.equal(final["both"][..., :16], final["left"][..., :16])
    assert torch.equal(final["both"][..., 16:], final["right"][..., 16:])
    assert not torch.equal(final["both"], final["left"]) and not torch.equal(final["both"], final["right"])
    patched = h.guided_model(h.guided_model(model, 0.1, mask=left), 0.8, mask=1 - left)
    expected, _, _ = recorded(
        model, h.guided_sampler(0.1, mask=left, sampler=h.guided_sampler(0.8, mask=1 - left, sampler="euler"))
    )
    assert torch.allclose(recorded(patched, h.core_sampler("euler"))[0], expected, atol=1e-5)


def inpainting():
    """A latent with a soft noise mask, and that mask as (B, 1, height, width)."""
    noise_mask = h.soft_disc(SIZE, 0.4)[None].clone()
    samples = h.sampled(h.exact_model("flow", SIZE), "euler", h.schedule(h.exact_model("flow", SIZE), 4))
    return {"samples": samples, "noise_mask": noise_mask}, noise_mask


@pytest.mark.parametrize("prediction, sampler", [("eps", "euler"), ("flow", "euler"), ("flow", None)])
def test_with_inpainting_the_common_region_counts(prediction, sampler):
    model, (latent, noise_mask) = h.exact_model(prediction, SIZE), inpainting()
    mask = h.soft_disc(64, 0.7, 0.6)
    result, seen, sigmas = recorded(*guided(model, "sampler", 0.2, sampler, mask=mask), latent)
    plain, _, _ = recorded(*guided(model, "sampler", 0.5, sampler), latent)
    region = (noise_mask > 0).float().expand(result.shape)
    if sampler:
        weights = h.resized(mask, result.shape) * region
        assert steering.deviation(model, seen, sigmas, 0.2, weights, region)[0] < 1e-4
    assert torch.equal(result[region == 0], plain[region == 0]) and not torch.equal(result, plain)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_previews_with_a_mask_are_unguided(name):
    model, seen = h.recording(h.exact_model("flow", SIZE))
    shown = []
    guider = h.outputs(h.custom.BasicGuider, model, h.conditioning())[0]
    with torch.inference_mode():
        guider.sample(
            h.random_noise().generate_noise(h.empty_latent(size=SIZE)),
            h.empty_latent(size=SIZE)["samples"],
            h.guided_sampler(0.05, sampler=name, mask=h.soft_disc(64)),
            h.schedule(model, STEPS),
            None,
            lambda i, denoised, x, total: shown.append(denoised.clone()),
            True,
            h.SEED,
        )
    assert len(shown) == STEPS and all(torch.equal(a, b) for a, b in zip(shown, seen.denoised))


# --- what it is for: the exact density ---------------------------------------------------------------------------


def shift_over_predicted(prediction, quantile, sampler, **more):
    """Measured over predicted change of log p, mean over 2 seeds: one component, read at the last level above zero."""
    model = h.exact_model(prediction, SIZE)
    sigmas = h.schedule(model, 30)[:-1]
    latent, positive = h.empty_latent(2, size=SIZE), h.conditioning(prediction, 5)
    path = path_of(model.get_model_object("model_sampling"))
    log_range = guided_steps(Schedule(path, sigmas.tolist())).log_range
    mask = more.get("mask")
    samples = latent["samples"]
    dim = samples[0].numel() if mask is None else float(h.resized(mask, samples.shape)[0].double().sum())
    weights = model.model.density.one_hot(5)

    def nats(q, **more):
        samples = h.sampled(model, h.guided_sampler(q, sampler=sampler, **more), sigmas, latent, positive=positive)
        bits = torch.tensor(exact.read(model, samples, sigmas, weights))
        return -bits * math.log(2) * latent["samples"][0].numel()

    predicted = (2 * dim) ** 0.5 * quantile_to_z(quantile) * log_range
    return float((nats(quantile, **more) - nats(0.5)).mean()) / predicted


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_curve_keeps_the_whole_shift(prediction):
    even = shift_over_predicted(prediction, 0.3, None)
    late, early = (shift_over_predicted(prediction, 0.3, None, curve=c) for c in ((0.0, 1.0), (2.0, 1.0, 0.0)))
    assert all(abs(v - 1) < 0.005 for v in (even, late, early)), (even, late, early)


@pytest.mark.parametrize("prediction, sampler", [("eps", "euler"), ("flow", None), ("eps", None)])
def test_region_shifts_its_share(prediction, sampler):
    """A Gaussian whose guidance covers a part: the predicted shift is that of the region's D."""
    ratio = shift_over_predicted(prediction, 0.3, sampler, mask=h.soft_disc(64))
    assert abs(ratio - 1) < (0.02 if sampler else 0.002), ratio


# --- the curve ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction, node", [("eps", "sampler"), ("flow", "model"), ("flow", "sampler")])
def test_the_curve_weights_the_steps(prediction, node):
    """Straight lines in ln s through the numbers, scaled to a mean of 1 (by the trapezoid rule)."""
    model, curve = h.exact_model(prediction, SIZE), (1.0, 4.0, 0.5)
    _, seen, sigmas = recorded(*guided(model, node, 0.2, curve=curve))
    steps = steering.guided_steps(model, sigmas)
    logs = {i: math.log(sigmas[i] / steering.alpha_of(model, sigmas[i])) for i in [*steps, steps[-1] + 1]}
    first, last = logs[steps[0]], logs[steps[-1] + 1]
    factors = {}
    for i in steps:
        t = 2 * (first - logs[i]) / (first - last)
        value = 1 + 3 * t if t <= 1 else 4 - 3.5 * (t - 1)
        factors[i] = value / ((1 + 2 * 4 + 0.5) / 4)
    assert steering.deviation(model, seen, sigmas, 0.2, factors=factors)[0] < 1e-4


@pytest.mark.parametrize("prediction, sampler", [("eps", None), ("flow", "euler"), ("flow", None)])
def test_an_even_curve_changes_nothing(sampler, prediction):
    """Also at sigma = 1 of a flow, where ln s is infinite."""
    model = h.exact_model(prediction, SIZE)
    plain, even, single = (
        recorded(model, h.guided_sampler(0.2, sampler=sampler, **more))[0]
        for more in ({}, {"curve": [3.0, 3.0, 3.0]}, {"curve": [0.2]})
    )
    assert torch.allclose(even, plain, atol=1e-5) and torch.allclose(single, plain, atol=1e-5)
    assert torch.equal(
        recorded(model, h.guided_sampler(0.5, sampler="euler", curve=[1.0, 0.0]))[0],
        recorded(model, h.core_sampler("euler"))[0],
    )


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, words",
    [
        ({"mask": 2 * torch.ones(1, 8, 8)}, ["mask", "2", "0 to 1"]),
        ({"mask": torch.full((1, 8, 8), math.nan)}, ["mask", "nan", "0 to 1"]),
        ({"mask": torch.ones(8)}, ["mask", "(8,)", "height"]),
        ({"mask": "face"}, ["mask", "str", "height"]),
        ({"curve": [1.0, -1.0]}, ["curve", "-1"]),
        ({"curve": [0.0, 0.0]}, ["curve", "0.0", "above 0"]),
        ({"curve": [1.0, math.inf]}, ["curve", "inf"]),
        ({"curve": []}, ["curve", "[]"]),
    ],
)
@NODES
def test_bad_masks_and_curves(node, more, words):
    with pytest.raises(ValueError) as error:
        guided(h.exact_model("flow", SIZE), node, 0.3, **more)
    assert all(word in str(error.value) for word in words), error.value


def test_a_steep_curve_allows_a_smaller_shift():
    model = h.exact_model("flow", SIZE)
    with pytest.raises(ValueError, match="detail_shift is 2.0"):
        recorded(model, h.guided_sampler(0.5, 2.0, sampler="euler", curve=[8.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("count", [2, 5])
def test_another_number_of_masks_is_refused(count):
    model, seen = h.recording(h.exact_model("flow"))
    with pytest.raises(ValueError, match=f"mask has {count} masks and the latent has 3 images"):
        h.sampled(model, h.guided_sampler(0.2, mask=torch.ones(count, 64, 64)), h.schedule(model, 4), h.empty_latent(3))
    assert seen.calls == 0

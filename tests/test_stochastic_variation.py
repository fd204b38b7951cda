"""StochasticDetailVariation and VariationGrid in the real host, on the model whose density is known."""

import logging
import math
from functools import lru_cache

import comfy.model_management
import comfy.sampler_helpers
import numpy as np
import pytest
import torch
from density_guidance.dg_core.variation import CORRECTIONS
from density_guidance.nodes import VariationGrid
from density_guidance.nodes.builtin import exact
from density_guidance.testing import host_runs as h
from density_guidance.testing.euler_maruyama import fine_details_change

EVERY_KIND = pytest.mark.parametrize("prediction", h.KINDS)
EVERY_CORRECTION = pytest.mark.parametrize("correction", CORRECTIONS)
KIND_AND_CORRECTION = pytest.mark.parametrize(
    "prediction, correction", [("flow", "expected"), ("flow", "hutchinson"), ("eps", "exact")]
)
VARIATIONS = 16  # docs/variation.md: 32
STEPS = 32


LARGER = 32  # where log-densities are compared in nats per dimension


def same_noise(count):
    """A latent of images that all start from the noise of the first."""
    return {**h.empty_latent(count, LARGER), "batch_index": [0] * count}


def schedule(model, to_zero=False):
    sigmas = h.schedule(model, STEPS)
    return sigmas if to_zero else sigmas[:-1]


def nats_per_dim(model, samples, sigmas):
    return -math.log(2) * np.array(exact.read(model, samples, sigmas))


@lru_cache
def log_density_run(prediction, vary, strength, correction):
    """(log-density change of the variations against the deterministic run, model calls)."""
    model, seen = h.recording(h.exact_model(prediction, LARGER))
    sigmas = schedule(model)
    plain = h.sampled(model, h.guided_sampler(), sigmas, same_noise(1))
    seen.calls = 0
    images = h.sampled(model, h.varied(vary, strength, correction), sigmas, same_noise(VARIATIONS))
    change = nats_per_dim(model, images, sigmas) - nats_per_dim(model, plain, sigmas)
    return change, seen.calls


@lru_cache
def euler_maruyama_run(prediction, calls):
    """The same for Euler-Maruyama with the exact correction in the window of "fine details", at `calls` model calls."""
    model = h.exact_model(prediction, LARGER)
    return fine_details_change(model, schedule(model).tolist(), 0.5, calls, VARIATIONS).numpy()


# --- the log-density is kept -------------------------------------------------------------------------------------


@KIND_AND_CORRECTION
def test_fine_details_keep_the_log_density(prediction, correction):
    """Bias and spread over variation seeds at 32 steps, and Euler-Maruyama at as many model calls, in nats per dimension."""
    change, calls = log_density_run(prediction, "fine details", 0.5, correction)
    reference = euler_maruyama_run(prediction, calls)
    error = change.std(ddof=1) / math.sqrt(VARIATIONS)
    print(
        f"{prediction} {correction}: bias {change.mean():+.2e} +- {error:.0e}, spread {change.std(ddof=1):.1e}, "
        f"{calls} calls; Euler-Maruyama {reference.mean():+.2e}, {reference.std(ddof=1):.1e}"
    )
    allowed = 2 if correction == "expected" else 1
    assert abs(change.mean()) + 3 * error <= allowed * 5e-3
    assert change.std(ddof=1) <= allowed * 2e-3
    assert abs(change.mean()) + 3 * error <= abs(reference.mean()) / 4
    assert change.std(ddof=1) <= reference.std(ddof=1) / 4
    assert (calls == STEPS - 1) == (correction == "expected")


@pytest.mark.parametrize("prediction, vary", [("eps", "structure"), ("flow", "everything"), ("flow", "structure")])
def test_other_windows_keep_the_log_density(prediction, vary):
    change, calls = log_density_run(prediction, vary, 0.5, "expected")
    print(f"{prediction} {vary}: bias {change.mean():+.2e}, spread {change.std(ddof=1):.1e}")
    assert calls == STEPS - 1
    assert abs(change.mean()) <= 1e-2 and change.std(ddof=1) <= 5e-3


@EVERY_KIND
def test_variations_keep_the_guided_level(prediction):
    """Quantile and shift act under the noise as without it."""
    model = h.exact_model(prediction, LARGER)
    sigmas = schedule(model)
    guided = nats_per_dim(model, h.sampled(model, h.guided_sampler(0.3, 0.2), sigmas, same_noise(1)), sigmas)
    plain = nats_per_dim(model, h.sampled(model, h.guided_sampler(), sigmas, same_noise(1)), sigmas)
    level = nats_per_dim(
        model,
        h.sampled(model, h.varied(quantile=0.3, detail_shift=0.2, correction="hutchinson"), sigmas, same_noise(4)),
        sigmas,
    )
    assert abs(guided - plain).min() > 0.1
    assert level == pytest.approx(np.repeat(guided, 4), abs=5e-3)


@KIND_AND_CORRECTION
def test_noise_from_the_first_step_on_keeps_what_guidance_adds(prediction, correction):
    """The change by the quantile, under noise that begins as early as there can be some, is that without noise."""
    model = h.exact_model(prediction, LARGER)
    sigmas = h.schedule(model, 20)[:-1]

    def added(samplers):
        levels = (nats_per_dim(model, h.sampled(model, s, sigmas, same_noise(4)), sigmas).mean() for s in samplers)
        return -np.subtract(*levels)

    without = added([h.guided_sampler(), h.guided_sampler(0.2)])
    under = added([h.varied("everything", 1.0, correction, quantile) for quantile in (0.5, 0.2)])
    print(f"{prediction} {correction}: {under / without:.3f}")
    assert under == pytest.approx(without, rel=0.03)


# --- by region ---------------------------------------------------------------------------------------------------


@KIND_AND_CORRECTION
def test_a_mask_keeps_the_log_density(prediction, correction):
    """Soft edges, one mask for each half of the batch: bias and spread as without, where the images differ enough."""
    model = h.exact_model(prediction, LARGER)
    sigmas = schedule(model)
    mask = torch.cat([h.soft_disc(64)] * 5 + [h.soft_disc(64, 0.3, 0.7, 0.25)] * 5)
    plain = h.sampled(model, h.guided_sampler(), sigmas, same_noise(1))
    images = h.sampled(model, h.varied(correction=correction, mask=mask), sigmas, same_noise(10))
    change = nats_per_dim(model, images, sigmas) - nats_per_dim(model, plain, sigmas)
    error = change.std(ddof=1) / math.sqrt(len(change))
    allowed = 2 if correction == "expected" else 1
    assert abs(change.mean()) + 3 * error <= allowed * 5e-3 and change.std(ddof=1) <= allowed * 2e-3
    inside = h.resized(mask, images.shape) == 1
    outside = h.resized(mask, images.shape) == 0
    difference = (images - plain).abs()
    assert float(difference[inside].mean()) > 5 * float(difference[outside].mean())
    for half in (images[:5], images[5:]):
        assert float(half.std(0).max()) > 0.02


@EVERY_CORRECTION
def test_outside_the_mask_is_the_plain_flow(correction):
    """A density of independent pixels: only the solver's error is left there, which vanishes with the steps."""
    model = h.free_model("EPS", h.noise_of_a_pattern)
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    mask = h.soft_disc(64)
    inside, outside = ((h.resized(mask, noise.shape) == v) for v in (1, 0))
    errors = []
    for steps in (24, 96):
        sigmas = h.schedule(model, steps)
        sampler = h.varied("everything", correction=correction, quantile=0.3, mask=mask)
        difference = (
            h.free_run(model, sampler, sigmas, noise) - h.free_run(model, h.guided_sampler(0.3, mask=mask), sigmas, noise)
        ).abs()
        errors.append(float(difference[outside].mean()))
        assert float(difference[inside].mean()) > 0.4
    print(f"{correction}: {errors}")
    assert errors[1] < errors[0] / 4**1.5 and errors[1] < 1e-3


@EVERY_KIND
def test_masks_that_change_nothing(prediction):
    model = h.exact_model(prediction)
    sigmas = h.schedule(model, 8)

    def run(quantile, **more):
        return h.sampled(model, h.varied("everything", quantile=quantile, **more), sigmas)

    guided = h.guided_sampler(0.3, mask=h.soft_disc(64))
    assert torch.equal(run(0.3, strength=0.0, mask=h.soft_disc(64)), h.sampled(model, guided, sigmas))
    assert torch.equal(run(0.3, mask=torch.zeros(1, 8, 8)), h.sampled(model, h.guided_sampler(), sigmas))
    for quantile in (0.3, 0.5):
        assert torch.allclose(run(quantile, mask=torch.ones(1, 8, 8)), run(quantile), atol=1e-4)


@EVERY_KIND
def test_mask_within_an_inpainting(prediction):
    """Noise where both masks are, and the original to the bit where nothing is replaced."""
    model = h.exact_model(prediction)
    sigmas = h.schedule(model, 8)
    latent = {**h.empty_latent(2), "samples": h.sampled(model, "euler", sigmas)}
    latent["noise_mask"] = torch.zeros(2, 1, h.SIZE, h.SIZE)
    half = h.SIZE // 2
    latent["noise_mask"][..., half:] = 1
    mask = torch.zeros(1, h.SIZE, h.SIZE)
    mask[:, half:] = 1
    result, plain = (
        h.sampled(model, sampler, sigmas, latent) for sampler in (h.varied("everything", mask=mask), h.guided_sampler())
    )
    difference = (result - plain).abs()
    assert not difference[..., :half].any()
    assert float(difference[..., half:, half:].mean()) > 3 * float(difference[..., :half, half:].mean())


# --- where the change is -----------------------------------------------------------------------------------------


def high_share(difference):
    """Share of the energy above half of the Nyquist frequency, by radius."""
    energy = torch.fft.fft2(difference.double()).abs().square().sum((0, 1))
    f = torch.fft.fftfreq(difference.shape[-1], dtype=torch.float64)
    return float(energy[torch.hypot(f[:, None], f[None, :]) > 0.25].sum() / energy.sum())


@lru_cache
def change_of(prediction, vary, strength):
    """Variations of 6 images minus the images."""
    model = h.exact_model(prediction, LARGER)
    sigmas = h.schedule(model, 16)
    plain = h.sampled(model, h.guided_sampler(), sigmas, h.empty_latent(6, LARGER))
    return h.sampled(model, h.varied(vary, strength), sigmas, h.empty_latent(6, LARGER)) - plain


@EVERY_KIND
def test_presets_change_what_they_say(prediction):
    fine, structure = (high_share(change_of(prediction, vary, 0.5)) for vary in ("fine details", "structure"))
    print(f"{prediction}: share of high frequencies {fine:.3f} in fine details, {structure:.3f} in structure")
    assert fine >= 0.75
    assert structure <= 0.3


@pytest.mark.parametrize("prediction, vary", [("eps", "fine details"), ("flow", "structure")])
def test_strength_scales_the_change(prediction, vary):
    """The table of docs/variation.md has more strengths and images."""
    size = [float(change_of(prediction, vary, c).square().mean().sqrt()) for c in (0.125, 0.5, 1.0, 3.0)]
    assert size[0] > 0 and all(b > a for a, b in zip(size, size[1:])), size


# --- neutral, seeds, batches -------------------------------------------------------------------------------------


@KIND_AND_CORRECTION
def test_neutral_is_the_own_solver_bit_for_bit(prediction, correction):
    model, seen = h.recording(h.exact_model(prediction))
    sigmas = h.schedule(model, 6)
    for quantile, shift in ((0.5, 0.0), (0.3, 0.2)):
        plain = h.sampled(model, h.guided_sampler(quantile, shift), sigmas)
        calls, seen.calls = seen.calls, 0
        for settings in ({"strength": 0.0}, {"vary": "custom", "window": (0.001, 0.002)}):
            sampler = h.varied(correction=correction, quantile=quantile, detail_shift=shift, **settings)
            assert torch.equal(h.sampled(model, sampler, sigmas), plain)
            assert seen.calls == calls
            seen.calls = 0
    assert not torch.equal(h.sampled(model, h.varied("everything", correction=correction), sigmas), plain)


def test_same_seed_gives_the_same_image():
    model = h.exact_model("flow")
    sigmas = h.schedule(model, 8)
    first, again, other = (h.sampled(model, h.varied("everything", seed=s), sigmas) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@KIND_AND_CORRECTION
def test_a_variation_does_not_depend_on_its_batch(prediction, correction):
    """The starting noise makes the variation: alone, in another order, among others. variation_index takes its place."""
    model = h.exact_model(prediction)
    sigmas = h.schedule(model, 8)[:-1]

    def batch(images, **lists):
        latent = {**h.empty_latent(len(images)), "batch_index": images}
        return h.sampled(model, h.varied("everything", correction=correction, **lists), sigmas, latent)

    together = batch([0, 1, 2, 3])
    mixed = batch([3, 1])
    assert torch.allclose(mixed[0], together[3], atol=1e-4) and torch.allclose(mixed[1], together[1], atol=1e-4)
    alone = batch([2])
    assert torch.allclose(alone[0], together[2], atol=1e-4)
    twins = batch([0, 0])
    assert torch.allclose(twins[0], together[0], atol=1e-4) and not torch.allclose(twins[0], twins[1], atol=1e-2)
    twins = batch([0, 0, 0], variation_index=[5.0, 5.0, 6.0])
    assert torch.allclose(twins[0], twins[1], atol=1e-4) and not torch.allclose(twins[0], twins[2], atol=1e-2)


# --- the host's other features -----------------------------------------------------------------------------------


@KIND_AND_CORRECTION
def test_inpainting(prediction, correction):
    model = h.exact_model(prediction)
    sigmas = h.schedule(model, 8)
    latent = {**h.empty_latent(2), "samples": h.sampled(model, "euler", sigmas)}
    latent["noise_mask"] = torch.zeros(2, 1, h.SIZE, h.SIZE)
    latent["noise_mask"][:, :, 8:24, 8:24] = 1
    samplers = h.varied("everything", correction=correction), h.guided_sampler()
    result, plain = (h.sampled(model, sampler, sigmas, latent) for sampler in samplers)
    outside = (latent["noise_mask"] == 0).expand_as(result)
    assert torch.equal(result[outside], plain[outside])
    assert float((result - plain)[~outside].abs().mean()) > 0.01


@EVERY_CORRECTION
@pytest.mark.parametrize(
    "shape, dtype",
    [((2, 16, 3, 8, 8), torch.float16), ((1, 8, 40), torch.bfloat16), ((2, 4, 8, 8), torch.float32)],
    ids=["video", "audio", "image"],
)
def test_latents_of_any_kind(shape, dtype, correction):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    model = h.free_model("FLOW", h.half)
    sigmas = h.schedule(model, 8)
    samplers = h.varied("everything", correction=correction), h.guided_sampler()
    result, plain = (h.free_run(model, sampler, sigmas, noise, cfg=2.0) for sampler in samplers)
    assert result.shape == noise.shape and torch.isfinite(result).all()
    assert float((result - plain).float().std()) > 0.01


def test_cfg():
    model = h.exact_model("flow")
    sigmas = h.schedule(model, 8)
    conds = {"positive": h.conditioning(component=3), "negative": h.conditioning(component=40), "cfg": 3.0}
    result, plain = (h.sampled(model, s, sigmas, **conds) for s in (h.varied("everything"), h.guided_sampler()))
    assert torch.isfinite(result).all() and not torch.allclose(result, plain, atol=1e-2)


def test_interrupt_stops_before_the_next_model_call():
    model, seen = h.recording(h.exact_model("flow"))
    model.set_model_sampler_post_cfg_function(
        lambda args: comfy.model_management.interrupt_current_processing(seen.calls == 6) or args["denoised"]
    )
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        h.sample(model, h.varied("everything", correction="exact", probes=8), h.schedule(model, 4))
    assert seen.calls == 6


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"vary": "colour"}, ["vary", "'colour'", "fine details", "custom"]),
        ({"strength": 3.5}, ["strength", "3.5", "0.0", "3.0"]),
        ({"strength": math.nan}, ["strength", "nan"]),
        ({"seed": -1}, ["variation_seed", "-1"]),
        ({"seed": 1.5}, ["variation_seed", "1.5", "whole"]),
        ({"probes": "2"}, ["probes", "'2'", "whole"]),
        ({"correction": "best"}, ["correction", "'best'", "hutchinson"]),
        ({"probes": 0}, ["probes", "0", "16"]),
        ({"quantile": 0.0}, ["quantile", "0.0", "0.001"]),
        ({"detail_shift": 3.0}, ["detail_shift", "3.0", "2"]),
        ({"vary": "custom", "window": (0.5, 0.5)}, ["start_percent", "end_percent", "smaller"]),
        ({"vary": "custom", "window": (-0.5, 0.5)}, ["start_percent", "-0.5"]),
        ({"variation_index": [0.5]}, ["variation_index", "image 0", "0.5", "whole"]),
        ({"variation_index": [-1.0]}, ["variation_index", "image 0", "-1"]),
        ({"variation_index": 3}, ["variation_index", "3", "list"]),
        ({"mask": 2 * torch.ones(1, 8, 8)}, ["mask", "2", "0 to 1"]),
    ],
    ids=str,
)
def test_bad_input_is_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        h.varied(**kwargs)
    assert not [word for word in words if word not in str(error.value)], str(error.value)


@pytest.mark.parametrize(
    "prediction, vary, steps", [("flow", "structure", 2), ("eps", "everything", 2), ("flow", "fine details", 4)]
)
def test_a_window_without_a_step_is_said_in_the_log(prediction, vary, steps, caplog):
    model = h.exact_model(prediction)
    sigmas = h.schedule(model, steps)
    with caplog.at_level(logging.WARNING):
        result = h.sampled(model, h.varied(vary), sigmas)
    assert vary in caplog.text and "nothing is varied" in caplog.text
    assert torch.equal(result, h.sampled(model, h.guided_sampler(), sigmas))


@EVERY_KIND
def test_a_second_stage_without_noise_knows_its_images(prediction):
    """DisableNoise: the state tells the images apart, in any batch."""
    model = h.exact_model(prediction)
    sigmas = h.schedule(model, 12)
    early, late = h.core_node("SplitSigmas", sigmas=sigmas, step=8)

    def staged(images):
        first = h.sampled(model, "euler", early, {**h.empty_latent(len(images)), "batch_index": images})
        no_noise = h.core_node("DisableNoise")
        return h.sampled(model, h.varied(strength=1.0), late, {"samples": first}, noise=no_noise)

    together, mixed = staged([0, 1, 2]), staged([2, 0])
    assert torch.allclose(mixed[0], together[2], atol=1e-3) and torch.allclose(mixed[1], together[0], atol=1e-3)


def test_the_bounds_of_the_seed():
    for seed in (0, 2**64 - 1):
        h.varied(seed=seed)
    with pytest.raises(ValueError, match="variation_seed is 18446744073709551616"):
        h.varied(seed=2**64)


def test_variation_index_that_does_not_fit_the_batch():
    model, seen = h.recording(h.exact_model("flow"))
    with pytest.raises(ValueError, match="variation_index has 3 numbers and the latent has 2 images"):
        h.sample(model, h.varied(variation_index=[0.0, 1.0, 2.0]), h.schedule(model, 3))
    assert seen.calls == 0


# --- grid --------------------------------------------------------------------------------------------------------


def test_grid_is_what_its_rows_would_be():
    """One run of a batch: rows differ by quantile only, columns by variation only."""
    model, seen = h.recording(h.exact_model("flow"))
    sigmas = h.schedule(model, 8)
    latent = {**h.empty_latent(3), "batch_index": [4, 5, 6]}
    grid, quantiles, index, levels, columns = h.outputs(VariationGrid, latent, "0.3, 0.5", 3)
    assert levels == [0.3, 0.5] and columns == 3 and quantiles == [0.3] * 3 + [0.5] * 3 and index == [0, 1, 2] * 2
    assert grid["samples"].shape == (6, 3, h.SIZE, h.SIZE) and grid["batch_index"] == [4] * 6
    together = h.sampled(model, h.varied(quantiles=quantiles, variation_index=index), sigmas, grid)
    assert seen.calls == 8
    for row, quantile in enumerate(levels):
        alone = h.sampled(
            model, h.varied(quantile=quantile, variation_index=index[:3]), sigmas, {**h.empty_latent(3), "batch_index": [4] * 3}
        )
        assert torch.allclose(together[3 * row : 3 * row + 3], alone, atol=1e-4)


def test_grid_repeats_the_mask_and_names_bad_input():
    latent = {**h.empty_latent(2), "noise_mask": torch.ones(2, 1, h.SIZE, h.SIZE)}
    assert h.outputs(VariationGrid, latent, "0.5", 4)[0]["noise_mask"].shape == (4, 1, h.SIZE, h.SIZE)
    for text, word in (
        ("0.5, 2", "quantiles, row 1, is 2"),
        ("a", "quantiles has 'a'"),
        ("", "quantiles is empty"),
        (0.5, "quantiles is 0.5; write numbers"),
    ):
        with pytest.raises(ValueError, match=word):
            h.outputs(VariationGrid, latent, text, 2)
    for bad in ({}, {"samples": torch.zeros(0, 3, 8, 8)}):
        with pytest.raises(ValueError, match="latent is empty"):
            h.outputs(VariationGrid, bad, "0.5", 2)
    for indices in ([], [0, 1, 2]):
        with pytest.raises(ValueError, match="latent has 2 images and a batch_index for"):
            h.outputs(VariationGrid, {**latent, "batch_index": indices}, "0.5", 2)
    for variations in (0, 65, 2.5, None):
        with pytest.raises(ValueError, match="variations is"):
            h.outputs(VariationGrid, latent, "0.5", variations)


def test_grid_of_a_video_keeps_the_mask_of_every_frame():
    frames = torch.zeros(5, 1, 8, 8)
    frames[3:] = 1
    grid = h.outputs(VariationGrid, {"samples": torch.zeros(1, 4, 5, 8, 8), "noise_mask": frames}, "0.3, 0.5", 2)[0]
    mask = comfy.sampler_helpers.prepare_mask(grid["noise_mask"], grid["samples"].shape, torch.device("cpu"))
    assert mask.shape[0] == 4 and torch.equal(mask[:, 0, :, 0, 0], torch.tensor([0.0, 0, 0, 1, 1]).expand(4, 5))

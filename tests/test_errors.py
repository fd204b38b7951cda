"""Bad input: an error that names the input, its value and what is right, before any model call."""

import math

import comfy.model_sampling
import pytest
import torch
from density_guidance import nodes
from density_guidance.testing import host_runs as h

NAN = math.nan
GUIDANCE = [
    ((NAN, 0.0, 0.0, 1.0), ["quantile", "nan", "0.001", "0.999"]),
    (("high", 0.0, 0.0, 1.0), ["quantile", "'high'", "0.001", "0.999"]),
    ((0.5, 2.5, 0.0, 1.0), ["detail_shift", "2.5", "-2", "2"]),
    ((0.5, 0.0, -0.1, 1.0), ["start_percent", "-0.1", "0.0", "1.0"]),
    ((0.5, 0.0, 0.0, math.inf), ["end_percent", "inf", "0.0", "1.0"]),
    ((0.5, 0.0, 0.6, 0.4), ["start_percent", "0.6", "end_percent", "0.4", "smaller"]),
    ((0.3, 0.0, 0.5, 0.5), ["start_percent", "end_percent", "0.5", "smaller"]),
]
PRIOR = [((NAN, 1.0, True), ["quantile", "nan", "0.001", "0.999"]), ((0.5, -1.0, True), ["scale", "-1.0", "0.0", "10.0"])]


class Bridge(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.IMG_TO_IMG):
    """A model that goes from image to image: no Gaussian noise path."""


@pytest.mark.parametrize("values, words", GUIDANCE, ids=lambda v: str(v)[:30])
def test_guidance_settings(values, words):
    h.fails(words, h.outputs, nodes.DensityGuidanceSampler, *values, h.core_sampler("euler"))
    h.fails(words, h.outputs, nodes.DensityGuidanceSampler, *values)
    h.fails(words, h.outputs, nodes.DensityGuidanceModel, h.exact_model("flow"), *values)


@pytest.mark.parametrize(
    "lists, words",
    [
        ({"quantiles": []}, ["quantiles", "[]", "list", "Density Levels"]),
        ({"detail_shifts": 0.5}, ["detail_shifts", "0.5", "list", "Density Levels"]),
        ({"quantiles": [0.5, 1.5]}, ["quantiles", "image 1", "1.5", "0.001", "0.999"]),
        ({"detail_shifts": [0.1, 0.2, "more"]}, ["detail_shifts", "image 2", "'more'", "-2", "2"]),
    ],
    ids=str,
)
def test_guidance_lists(lists, words):
    h.fails(words, h.guided_sampler, **lists)
    h.fails(words, h.guided_sampler, sampler="euler", **lists)
    h.fails(words, h.guided_model, h.exact_model("flow"), **lists)


@pytest.mark.parametrize("way", ["euler", None, "patch"])
@pytest.mark.parametrize(
    "lists, words",
    [
        ({"quantiles": [0.3, 0.4, 0.7]}, ["quantiles", "3 numbers", "2 images"]),
        ({"quantiles": [0.3, 0.3], "detail_shifts": [0.1] * 4}, ["detail_shifts", "4 numbers", "2 images"]),
    ],
    ids=["quantiles", "detail_shifts"],
)
def test_lists_that_do_not_fit_the_batch(way, lists, words):
    model, seen = h.recording(h.exact_model("flow"))
    sampler = h.core_sampler("euler") if way == "patch" else h.guided_sampler(sampler=way, **lists)
    if way == "patch":
        model = h.guided_model(model, **lists)
    h.fails(words, h.sample, model, sampler, h.schedule(model, 3))
    assert seen.calls == 0


@pytest.mark.parametrize("values, words", PRIOR, ids=lambda v: str(v)[:30])
def test_prior_settings(values, words):
    h.fails(words, h.outputs, nodes.PriorGuidanceScale, h.random_noise(), *values)
    h.fails(words, h.outputs, nodes.PriorGuidanceModel, h.exact_model("flow"), *values)


@pytest.mark.parametrize("wrong", [object(), "euler", 3.0], ids=["an object", "text", "a number"])
def test_wrong_sockets(wrong):
    kind = type(wrong).__name__
    h.fails(["sampler", kind, "KSamplerSelect"], h.outputs, nodes.DensityGuidanceSampler, 0.5, 0.0, 0.0, 1.0, wrong)
    h.fails(["noise", kind, "RandomNoise"], h.outputs, nodes.PriorGuidanceScale, wrong, 0.5, 1.0, True)


def test_no_sampler_means_the_own_solver():
    assert h.guided_sampler(0.3).sample.__func__ is type(h.core_sampler("euler")).sample


def guided_runs(model, sampler):
    """A model and a sampler that guide: by a wrapped sampler, the own solver, or a patch of the model."""
    if sampler == "patch":
        return h.guided_model(model, 0.3), h.core_sampler("euler")
    return model, h.guided_sampler(0.3, sampler=None if sampler == "own" else sampler)


EVERY_WAY = pytest.mark.parametrize("way", ["euler", "own", "patch"])


@EVERY_WAY
def test_model_samplings_without_a_log_density(way):
    model, seen = h.recording(h.free_model("EPS"))
    model.add_object_patch("model_sampling", Bridge())
    words = ["IMG_TO_IMG", "no Gaussian noise path", "eps, v, EDM", "flow"]
    h.fails(words, h.free_run, *guided_runs(model, way), torch.tensor([10.0, 3.0, 1.0, 0.0]), torch.ones(1, 4, 8, 8))
    assert seen.calls == 0


def test_neutral_settings_refuse_no_model():
    model = h.free_model("EPS", lambda x, t: x / 2)
    model.add_object_patch("model_sampling", Bridge())
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    schedule = torch.tensor([10.0, 3.0, 1.0, 0.0])
    plain, neutral = (
        h.free_run(model, sampler, schedule, noise)
        for sampler in (h.core_sampler("euler"), h.guided_sampler(0.5, sampler="euler"))
    )
    assert torch.isfinite(plain).all() and torch.equal(plain, neutral)


@EVERY_WAY
@pytest.mark.parametrize("prediction", h.KINDS)
@pytest.mark.parametrize(
    "sigmas, words",
    [
        ([0.0, 0.1, 0.5, 0.9], ["sigmas", "0.1", "0.9", "descend"]),
        ([0.9, 0.3, 0.5, 0.0], ["sigmas", "0.3", "0.5", "descend"]),
        ([0.9, NAN, 0.1, 0.0], ["sigmas", "nan", "finite"]),
        ([math.inf, 0.5, 0.1, 0.0], ["sigmas", "inf", "finite"]),
        ([0.9, 0.5, -0.1], ["sigmas", "-0.1", "not negative"]),
    ],
    ids=["ascending", "up and down", "nan", "infinite", "negative"],
)
def test_schedules(way, prediction, sigmas, words):
    model, seen = h.recording(h.exact_model(prediction))
    h.fails(words, h.sample, *guided_runs(model, way), torch.tensor(sigmas))
    assert seen.calls == 0


@EVERY_WAY
def test_sigmas_of_another_model(way):
    model, seen = h.recording(h.exact_model("flow"))
    h.fails(["sigmas", "60.0", "above 1", "scheduler"], h.sample, *guided_runs(model, way), torch.tensor([60.0, 8.0, 1.0, 0.1]))
    assert seen.calls == 0


@pytest.mark.parametrize(
    "prediction, size, words",
    [
        ("x0", "32", ["prediction", "'x0'", "eps, v, flow"]),
        ("eps", "40", ["size", "'40'", "64, 48, 32"]),
        (None, "32", ["prediction", "None"]),
        ("eps", None, ["size", "None"]),
    ],
)
def test_choices_of_the_loader(prediction, size, words):
    h.fails(words, h.outputs, nodes.LoadExactDensityModel, prediction, size, -1, 1)


def test_a_run_without_a_guided_step_is_said_in_the_log(caplog):
    model = h.exact_model("eps")
    h.sample(model, h.guided_sampler(0.3), h.schedule(model, 1))
    assert "start_percent" in caplog.text and "nothing is guided" in caplog.text


@pytest.mark.parametrize("way", ["euler", None, "patch"])
def test_an_empty_noise_mask_leaves_the_image(way):
    """One of all images, or of some: there is nothing to guide, and nothing to divide by."""
    model = h.exact_model("eps")
    samples = torch.rand(2, 3, h.SIZE, h.SIZE, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(2, 1, h.SIZE, h.SIZE)
    mask[0, :, :8] = 1
    for noise_mask in (mask, torch.zeros_like(mask)):
        latent = {"samples": samples, "noise_mask": noise_mask}
        patched, sampler = (
            (h.guided_model(model, 0.3, 0.1), "euler") if way == "patch" else (model, h.guided_sampler(0.3, 0.1, sampler=way))
        )
        result = h.sampled(patched, sampler, h.schedule(model, 4), latent)
        assert torch.isfinite(result).all()
        assert torch.allclose(result[1], samples[1], atol=1e-5)


def test_the_own_solver_refuses_to_ascend_without_guidance_too():
    model, seen = h.recording(h.exact_model("eps"))
    h.fails(["sigmas", "0.1", "10.0", "descend"], h.sample, model, h.guided_sampler(), torch.tensor([0.1, 1.0, 10.0]))
    assert seen.calls == 0


@pytest.mark.parametrize(
    "values, words",
    [
        ("0.1, many", ["values", "'many'", "commas"]),
        ("0.1, nan", ["values", "'nan'", "commas"]),
        ("1e999", ["values", "'1e999'", "commas"]),
        ("0.1; 0.2", ["values", "'0.1; 0.2'", "commas"]),
        ("", ["values", "empty", "commas"]),
        (" ,\n, ", ["values", "empty", "commas"]),
    ],
)
def test_density_levels(values, words):
    h.fails(words, h.outputs, nodes.DensityLevels, values)


def test_density_levels_reads_numbers():
    assert h.outputs(nodes.DensityLevels, " .05, 3e-1,\n-2,, ") == ([0.05, 0.3, -2.0],) * 2


@pytest.mark.parametrize(
    "sigmas, words",
    [
        ([1.0, 0.5, 0.0], ["sigmas", "0.0", "above 0", "SplitSigmas"]),
        ([], ["sigmas", "above 0", "SplitSigmas"]),
        ([0.5, NAN], ["sigmas", "nan", "above 0"]),
    ],
)
def test_log_density_needs_a_noise_level(sigmas, words):
    h.fails(words, h.outputs, nodes.ExactLogDensity, h.exact_model("eps"), h.empty_latent(), torch.tensor(sigmas))


def test_log_density_needs_the_built_in_model():
    words = ["model", "BaseModel", "Load Exact Density Model"]
    h.fails(words, h.outputs, nodes.ExactLogDensity, h.free_model(), h.empty_latent(), torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 4, 32, 32), (1, 3, 2, 32, 32)], ids=str)
def test_log_density_of_another_latent(shape):
    h.fails(
        ["latent", " x ".join(map(str, shape[1:])), f"3 x {h.SIZE} x {h.SIZE}"],
        h.outputs,
        nodes.ExactLogDensity,
        h.exact_model("eps"),
        {"samples": torch.zeros(shape)},
        torch.tensor([1.0, 0.5]),
    )


def test_log_density_at_a_sigma_beyond_the_flow():
    """A flow model has no sigma of 1 or more."""
    h.fails(["sigmas", "1.0"], h.outputs, nodes.ExactLogDensity, h.exact_model("flow"), h.empty_latent(), torch.tensor([1.0]))


@pytest.mark.parametrize(
    "lists, words",
    [
        ({"bits_per_dim": [[1.0]]}, ["bits_per_dim", "1", "images", "2"]),
        ({"levels": [0.1, 0.2, 0.3]}, ["levels", "3", "images", "2"]),
        ({"bits_per_dim": [[1.0], []]}, ["bits_per_dim"]),
        ({"bits_per_dim": [[1.0], [1.0, 2.0]]}, ["bits_per_dim"]),
    ],
    ids=["rows of numbers", "levels", "too few numbers", "too many numbers"],
)
def test_contact_sheet_of_unequal_lists(lists, words):
    images = [torch.zeros(1, 8, 8, 3)] * 2
    h.fails(words, h.outputs, nodes.DensityContactSheet, images, ["q"], [32], **lists)


@pytest.mark.parametrize(
    "name, component, batch_size, words",
    [
        ("component", -2, 1, ["-2", "-1", "127"]),
        ("component", 128, 1, ["128", "-1", "127"]),
        ("batch_size", 0, 0, ["0", "1", "64"]),
        ("batch_size", 0, 65, ["65", "1", "64"]),
    ],
)
def test_numbers_of_the_loader(name, component, batch_size, words):
    h.fails([name, *words], h.outputs, nodes.LoadExactDensityModel, "flow", "32", component, batch_size)


@pytest.mark.parametrize("size", [0, 4096])
def test_size_of_the_contact_sheet(size):
    images = [torch.zeros(1, 8, 8, 3)]
    h.fails(["picture_size", str(size), "32", "2048"], h.outputs, nodes.DensityContactSheet, images, ["q"], [size])

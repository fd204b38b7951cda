"""Prior guidance: the norm of the starting noise, image by image, through the host's noise sources and samplers."""

import comfy.nested_tensor
import comfy.patcher_extension
import numpy as np
import pytest
import scipy.stats
import torch
from comfy_extras.nodes_custom_sampler import DisableNoise
from density_guidance.nodes import PriorGuidanceModel, PriorGuidanceScale
from density_guidance.testing import host_runs as h

EVERY_KIND = pytest.mark.parametrize("prediction", h.KINDS)


def scaled(noise=None, quantile=0.5, scale=1.0, match=True):
    return h.outputs(PriorGuidanceScale, noise or h.random_noise(), quantile, scale, match)[0]


def scaled_model(model, quantile=0.5, scale=1.0, match=True):
    return h.kept(h.outputs(PriorGuidanceModel, model, quantile, scale, match)[0])


def norms(noise):
    return torch.linalg.vector_norm(noise.double().flatten(1), dim=1).numpy()


@pytest.mark.parametrize("quantile", [0.001, 0.05, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (5, 3, 32, 32), (2, 16, 3, 8, 8), (2, 8, 40)], ids=str)
def test_norm_of_every_image_is_the_chi_quantile(quantile, shape):
    """A high quantile of the log-density is a small norm."""
    noise = scaled(quantile=quantile).generate_noise({"samples": torch.zeros(shape)})
    wanted = scipy.stats.chi.ppf(1 - quantile, np.prod(shape[1:]))
    np.testing.assert_allclose(norms(noise), wanted, rtol=1e-6)


@pytest.mark.parametrize("batch_index", [[0, 1, 2], [5, 1, 5], [9, 9, 0]], ids=str)
def test_batch_index_picks_the_same_noise_as_the_host(batch_index):
    latent = {**h.empty_latent(3), "batch_index": batch_index}
    plain = h.random_noise().generate_noise(latent)
    noise = scaled(quantile=0.2).generate_noise(latent)
    np.testing.assert_allclose(norms(noise), scipy.stats.chi.ppf(0.8, 3 * h.SIZE**2), rtol=1e-6)
    factor = norms(noise) / norms(plain)
    np.testing.assert_allclose(noise.double(), plain.double() * factor.reshape(-1, 1, 1, 1), rtol=1e-6)
    alone = scaled(quantile=0.2).generate_noise({**h.empty_latent(1), "batch_index": batch_index[1:2]})
    assert torch.equal(alone[0], noise[1])


def test_seed_is_kept():
    assert scaled(h.random_noise(123)).seed == 123


@pytest.mark.parametrize("settings", [(0.5, 1.0, True), (0.1, 2.0, True), (0.5, 3.0, False)], ids=str)
def test_no_noise_stays_no_noise(settings):
    source = h.outputs(DisableNoise)[0]
    noise = scaled(source, *settings)
    latent = h.empty_latent()
    assert torch.equal(noise.generate_noise(latent), source.generate_noise(latent)) and noise.seed == source.seed


def test_neutral_is_bit_identical():
    latent = h.empty_latent()
    assert torch.equal(scaled(match=False).generate_noise(latent), h.random_noise().generate_noise(latent))


@pytest.mark.parametrize("match", [True, False])
def test_scale_multiplies(match):
    latent = h.empty_latent()
    one, more = (scaled(scale=s, match=match).generate_noise(latent) for s in (1.0, 1.05))
    np.testing.assert_allclose(norms(more) / norms(one), 1.05, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtype_of_the_latent_is_kept(dtype):
    """The squared norm, 65,536, overflows float16."""
    noise = scaled(quantile=0.01).generate_noise({"samples": torch.zeros(2, 16, 64, 64, dtype=dtype)})
    assert noise.dtype == dtype
    np.testing.assert_allclose(norms(noise), scipy.stats.chi.ppf(0.99, 65536), rtol=max(1e-6, torch.finfo(dtype).eps / 20))


def test_mask_limits_the_norm_and_the_change():
    latent = {**h.empty_latent(), "noise_mask": h.two_masks()}
    plain, noise = h.random_noise().generate_noise(latent), scaled(quantile=0.1).generate_noise(latent)
    inside = (h.two_masks() > 0).expand_as(noise)
    assert torch.equal(noise[~inside], plain[~inside])
    np.testing.assert_allclose(norms(noise * inside), scipy.stats.chi.ppf(0.9, inside.flatten(1).sum(1)), rtol=1e-6)


def test_mask_at_another_resolution():
    """The host stretches a mask to the latent; every element that it touches counts."""
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    latent = {**h.empty_latent(), "noise_mask": mask}
    plain, noise = h.random_noise().generate_noise(latent), scaled(quantile=0.1).generate_noise(latent)
    changed = (noise != plain).any(1, keepdim=True).expand_as(noise)
    half = 3 * h.SIZE * (h.SIZE // 2)
    assert half <= int(changed[0].sum()) <= half + 3 * h.SIZE
    np.testing.assert_allclose(norms(noise * changed), scipy.stats.chi.ppf(0.9, int(changed[0].sum())), rtol=1e-6)


def test_parts_of_nested_noise_are_scaled_each():
    """Video and audio of one latent have a prior each, and so a quantile each."""
    parts = [torch.zeros(2, 16, 3, 8, 8), torch.zeros(2, 8, 40)]
    latent = {"samples": comfy.nested_tensor.NestedTensor(parts)}
    noise = scaled(quantile=0.2).generate_noise(latent).unbind()
    assert [n.shape for n in noise] == [p.shape for p in parts]
    for scaled_part, part in zip(noise, parts):
        np.testing.assert_allclose(norms(scaled_part), scipy.stats.chi.ppf(0.8, part[0].numel()), rtol=1e-6)


@pytest.mark.parametrize(
    "prediction, settings, latent",
    [
        ("eps", (0.1, 1.0, True), "empty"),
        ("flow", (0.9, 1.02, True), "img2img"),
        ("eps", (0.5, 1.05, False), "inpaint"),
        ("flow", (0.1, 1.0, True), "inpaint"),
        ("eps", (0.9, 1.02, True), "img2img"),
        ("flow", (0.5, 1.05, False), "empty"),
    ],
    ids=str,
)
def test_model_patch_in_ksampler_equals_the_noise_source(prediction, settings, latent):
    model, denoise = h.exact_model(prediction), 1.0
    samples = {**h.empty_latent(), "batch_index": [4, 2]}
    if latent != "empty":
        image = torch.rand(2, 3, h.SIZE, h.SIZE, generator=torch.Generator().manual_seed(1)) - 0.5
        samples, denoise = {"samples": image}, 0.5
    if latent == "inpaint":
        samples["noise_mask"] = h.two_masks()
    schedule = h.schedule(model, 4, denoise=denoise)
    expected = h.sampled(model, "euler", schedule, samples, noise=scaled(None, *settings))
    result = h.ksampler(scaled_model(model, *settings), "euler", 4, latent=samples, denoise=denoise)
    assert torch.equal(result, expected)
    assert not torch.equal(result, h.ksampler(model, "euler", 4, latent=samples, denoise=denoise))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 2, 8, 8), (2, 4, 16)], ids=str)
def test_a_mask_that_the_host_has_prepared_is_taken_as_it_is(shape):
    """Since 0.6 the host prepares a mask before the wrappers of a model get it; preparing it anew would mix up the images."""
    mask = torch.zeros(2, 1, *shape[2:])
    mask[0, ..., : shape[-1] // 2] = 1
    mask[1, ..., shape[-1] // 4 :] = 1
    prepared = mask.expand(shape).contiguous()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    model = scaled_model(h.exact_model("flow"), 0.1)
    wrapper = model.get_all_wrappers(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE)[-1]
    seen = wrapper(lambda noise, *_: noise, noise, torch.zeros(shape), None, None, prepared)
    inside = prepared > 0
    assert torch.equal(seen[~inside], noise[~inside])
    np.testing.assert_allclose(norms(seen * inside), scipy.stats.chi.ppf(0.9, inside.flatten(1).sum(1)), rtol=1e-6)


def test_neutral_model_patch_changes_no_bit():
    model = h.exact_model("flow")
    neutral = h.ksampler(scaled_model(model, match=False), "euler", 3)
    assert torch.equal(neutral, h.ksampler(model, "euler", 3))


@EVERY_KIND
def test_first_state_has_the_norm_of_the_quantile(prediction):
    """What the model sees first: the noise at the norm asked for, scaled by the host."""
    model, seen = h.recording(h.exact_model(prediction))
    h.sample(model, "euler", h.schedule(model, 2), noise=scaled(quantile=0.05))
    factor = float(seen.sigma[0][0]) if prediction == "flow" else float((1 + seen.sigma[0][0].double() ** 2).sqrt())
    np.testing.assert_allclose(norms(seen.x[0]) / factor, scipy.stats.chi.ppf(0.95, 3 * h.SIZE**2), rtol=1e-6)


def test_both_guidances_together():
    """The patches commute: each acts at its own place."""
    model = h.exact_model("flow")
    one = h.guided_model(scaled_model(model, 0.1), 0.3)
    other = scaled_model(h.guided_model(model, 0.3), 0.1)
    a, b = (h.ksampler(m, "euler", 4) for m in (one, other))
    assert torch.equal(a, b)
    c = h.sampled(model, h.guided_sampler(0.3, sampler="euler"), h.schedule(model, 4), noise=scaled(quantile=0.1))
    assert torch.equal(a, c)

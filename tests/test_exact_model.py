"""The model with a known density: its mathematics against autograd and dense Gaussians, and the model against it."""

import comfy.samplers
import latent_preview
import numpy as np
import pytest
import scipy.fft
import torch
from density_guidance.dg_core.exact_density import ExactDensity
from density_guidance.nodes.builtin import exact
from density_guidance.testing import host_runs as h

EVERY_KIND = pytest.mark.parametrize("prediction", h.PREDICTIONS)


@pytest.fixture(scope="module")
def small():
    """8 x 8 images: D = 192, so that dense matrices are cheap."""
    return ExactDensity.load(exact.WEIGHTS, 8)


@pytest.fixture(scope="module")
def density():
    return ExactDensity.load(exact.WEIGHTS, h.SIZE)


def points(density, count, s):
    """Draws from p_s, so that the exact numbers are tried where samplers go."""
    return density.sample(count, s, torch.Generator().manual_seed(int(1000 * s) + count))


def few(density, *components):
    """Weights of a mixture of some components."""
    weights = torch.zeros(1, density.components, dtype=torch.float64)
    weights[0, list(components)] = torch.arange(1.0, len(components) + 1, dtype=torch.float64)
    return weights


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- the density -------------------------------------------------------------------------------------------------


def dense(density, s, components=None):
    """The same mixture as torch's own, of the DCT coefficients."""
    pick = list(range(density.components)) if components is None else components
    w = density.factors[pick]
    full = torch.zeros(len(pick), w.shape[1], density.dim, dtype=torch.float64)
    full[..., density.low_slots] = w
    variance = density.band_variance[density.index] + s**2
    covariance = full.mT @ full + torch.diag(variance)
    normal = torch.distributions.MultivariateNormal(density.means[pick], covariance)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=density.log_weights[pick]), normal)


def coefficients(y):
    return torch.from_numpy(scipy.fft.dctn(y.numpy(), axes=(1, 2, 3), norm="ortho")).flatten(1)


@pytest.mark.parametrize("s", [0.0, 0.1, 3.0, 60.0])
def test_log_prob_is_that_of_the_dense_mixture(small, s):
    y = torch.cat([points(small, 3, s), points(small, 3, s + 1)])
    expected = dense(small, s).log_prob(coefficients(y))
    torch.testing.assert_close(small.log_prob(y, s), expected, rtol=1e-9, atol=1e-6)


def test_bits_per_dim_is_its_unit(small):
    y = points(small, 3, 0.5)
    expected = -dense(small, 0.5).log_prob(coefficients(y)) / np.log(2) / 192
    torch.testing.assert_close(small.bits_per_dim(y, 0.5), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("s", [0.1, 2.0, 20.0, 60.0])
def test_score_is_the_gradient(density, s):
    y = points(density, 2, s).requires_grad_()
    (gradient,) = torch.autograd.grad(density.log_prob(y, s).sum(), y)
    assert relative(density.score(y, s).detach(), gradient) < 1e-9
    tweedie = y.detach() + s**2 * gradient
    assert relative(density.denoised(y.detach(), s), tweedie) < 1e-8


@pytest.mark.parametrize("weights", [None, (3, 40), (17,)], ids=["all", "two", "one"])
@pytest.mark.parametrize("s", [0.3, 10.0, 60.0])
def test_laplacian_and_hessian_products_are_second_derivatives(small, s, weights):
    weights = None if weights is None else few(small, *weights)
    y = points(small, 1, s)
    hessian = torch.autograd.functional.hessian(
        lambda v: small.log_prob(v.view_as(y), s, weights).sum(), y.flatten(), vectorize=True
    )
    torch.testing.assert_close(small.laplacian(y, s, weights)[0], hessian.trace(), rtol=1e-8, atol=1e-8)
    v = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert relative(small.hessian_product(y, s, v, weights).flatten(), hessian @ v.flatten()) < 1e-8


@pytest.mark.parametrize("s", [0.3, 20.0])
def test_hessian_product_is_the_slope_of_the_score(density, s):
    y = points(density, 2, s)
    v = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-4 * s
    slope = (density.score(y + step * v, s) - density.score(y - step * v, s)) / (2 * step)
    assert relative(density.hessian_product(y, s, v), slope) < 1e-5


def test_noise_levels_and_weights_go_with_their_image(small):
    """A batch with a level and a mixture for each image equals the images one by one."""
    y, levels = points(small, 3, 1.0), torch.tensor([0.2, 5.0, 0.2])
    weights = torch.cat([few(small, 1), few(small, 2, 3), few(small, 4, 5, 6)])
    for method in (small.log_prob, small.laplacian, small.denoised):
        alone = [method(y[i : i + 1], float(levels[i]), weights[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(method(y, levels, weights), torch.cat(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size, full", [(32, 64), (16, 32), (48, 64)])
def test_a_smaller_size_is_the_exact_marginal(size, full):
    """The low DCT frequencies, in the units of the smaller image: means, covariances and spectrum."""
    small, large = (ExactDensity.load(exact.WEIGHTS, n) for n in (size, full))
    keep = torch.arange(3 * full**2).view(3, full, full)[:, :size, :size].flatten()
    unit = size / full
    torch.testing.assert_close(small.means, unit * large.means[:, keep])
    torch.testing.assert_close(small.band_variance[small.index], unit**2 * large.band_variance[large.index][keep])
    for k in (0, 77):
        a, b = (torch.zeros(d.factors.shape[1], d.dim, dtype=torch.float64) for d in (small, large))
        a[:, small.low_slots], b[:, large.low_slots] = small.factors[k], large.factors[k]
        torch.testing.assert_close(a, unit * b[:, keep])


def test_samples_have_the_moments_of_a_component(small):
    """Mean, covariance and entropy within five standard errors."""
    count, s, k = 8000, 0.5, 17
    y = small.sample(count, s, torch.Generator().manual_seed(5), small.one_hot(k))
    c, normal = coefficients(y), dense(small, s, [k]).component_distribution
    variance = normal.variance[0]
    assert ((c.mean(0) - small.means[k]).abs() < 5 * (variance / count).sqrt()).all()
    assert ((c.var(0) / variance - 1).abs() < 5 * (2 / count) ** 0.5).all()
    probe = torch.randn(small.dim, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    wanted = ((normal.covariance_matrix[0] @ probe) * probe).sum(0)
    assert (((c - small.means[k]) @ probe).square().mean(0) / wanted - 1).abs().max() < 5 * (2 / count) ** 0.5
    log_p = small.log_prob(y, s, small.one_hot(k))
    assert abs(log_p.mean() + normal.entropy()[0]) < 5 * (small.dim / 2 / count) ** 0.5


def test_samples_visit_the_components_by_weight(small):
    weights, count = few(small, 3, 40, 90), 3000
    y = small.sample(count, 0.3, torch.Generator().manual_seed(5), weights)
    each = torch.stack([small.log_prob(y, 0.3, small.one_hot(k)) for k in (3, 40, 90)])
    share = torch.bincount(each.argmax(0), minlength=3) / count
    p = weights[0, [3, 40, 90]] / weights.sum()
    assert ((share - p).abs() < 5 * (p * (1 - p) / count).sqrt()).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda d: d.log_prob(torch.zeros(1, 3, 16, 16), 1.0), ["(1, 3, 16, 16)", "(B, 3, 8, 8)"]),
        (lambda d: d.log_prob(torch.zeros(3, 3, 8, 8), torch.ones(2)), ["s has shape (2,)"]),
        (lambda d: d.score(torch.zeros(1, 3, 8, 8), 1.0, torch.ones(1, 5)), ["weights has shape (1, 5)", "128"]),
        (lambda d: d.one_hot(128), ["component is 128", "127"]),
        (lambda d: ExactDensity.load(exact.WEIGHTS, 100), ["size is 100", "64"]),
    ],
    ids=["y", "s", "weights", "component", "size"],
)
def test_errors_name_what_is_wrong(small, call, words):
    with pytest.raises(ValueError) as error:
        call(small)
    assert all(word in str(error.value) for word in words)


# --- the model in the host ---------------------------------------------------------------------------------------


def apply(model, x, sigma, condition):
    """The denoised prediction as the host computes it."""
    context = condition[0][0].expand(len(x), -1, -1)
    with torch.inference_mode():
        return model.model.apply_model(x, torch.full((len(x),), sigma), c_crossattn=context)


@EVERY_KIND
@pytest.mark.parametrize("component", [-1, 5])
@pytest.mark.parametrize("level", [0.0, 0.02, 0.3, 0.7, 1.0])
def test_prediction_of_the_host_is_the_exact_one(density, prediction, component, level):
    """From the smallest to the largest sigma; at sigma = 1 a flow model knows only the mean of its data."""
    model = h.exact_model(prediction)
    table = model.model.model_sampling.sigmas
    sigma = float(table[round(level * (len(table) - 1))])
    weights = density.log_weights.exp()[None] if component < 0 else density.one_hot(component)
    flow = prediction == "flow"
    alpha = 1 - sigma if flow else 1.0
    x0 = density.sample(3, 0.0, torch.Generator().manual_seed(8), weights)
    x = (alpha * x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(9))).float()
    result = apply(model, x, sigma, h.conditioning(prediction, component))
    if alpha == 0:
        mean = density.means[component] if component >= 0 else weights[0] / weights.sum() @ density.means
        expected = torch.from_numpy(scipy.fft.idctn(mean.view(1, 3, h.SIZE, h.SIZE).numpy(), axes=(1, 2, 3), norm="ortho"))
        expected = expected.expand_as(x)
    else:
        expected = density.denoised(x.double() / alpha, sigma / alpha, weights)
    assert float((result - expected).abs().max() / expected.abs().max()) < 1e-5


@EVERY_KIND
def test_sigmas_differ_within_a_batch(prediction):
    """CFG batches and other packs may send any mix of noise levels."""
    model, condition = h.exact_model(prediction), h.conditioning(prediction)
    x = torch.randn(2, 3, h.SIZE, h.SIZE, generator=torch.Generator().manual_seed(9))
    sigmas = model.model.model_sampling.sigmas[[10, 60]]
    with torch.inference_mode():
        both = model.model.apply_model(x, sigmas, c_crossattn=condition[0][0].expand(2, -1, -1))
    for i in range(2):
        assert relative(both[i : i + 1], apply(model, x[i : i + 1], float(sigmas[i]), condition)) < 1e-5


@pytest.mark.parametrize("sampler", ["euler", "guided euler", "own", "guided own", "variation"])
def test_v_is_the_same_function_as_eps(sampler):
    """Its predictions are those of eps, with any condition and under CFG, and so are its runs: other tests leave it out."""
    models = [h.exact_model(p) for p in ("eps", "v")]
    conds = {"positive": h.conditioning("eps", 17), "negative": h.conditioning("eps"), "cfg": 2.0}
    make = {
        "euler": lambda: h.core_sampler("euler"),
        "guided euler": lambda: h.guided_sampler(0.2, 0.1, sampler="euler"),
        "own": h.guided_sampler,
        "guided own": lambda: h.guided_sampler(0.2, 0.1),
        "variation": lambda: h.varied("everything", 1.0, "exact", 0.3),
    }[sampler]
    runs = [h.sampled(model, make(), h.schedule(model, 10, "karras"), **conds) for model in models]
    assert relative(*runs) < 1e-5
    for model in models:
        assert torch.equal(model.model.model_sampling.sigmas, models[0].model.model_sampling.sigmas)
    x = torch.randn(2, 3, h.SIZE, h.SIZE, generator=torch.Generator().manual_seed(9))
    for sigma in (0.1, 1.0, 12.0, 160.0):
        for condition in (h.conditioning("eps"), h.conditioning("eps", 17)):
            eps, v = (apply(model, (1 + sigma**2) ** 0.5 * x, sigma, condition) for model in models)
            assert relative(v, eps) < 1e-5


@pytest.mark.parametrize(
    "prediction, shape", [("eps", (1, 4, 32, 32)), ("flow", (1, 3, 64, 64)), ("v", (2, 3, 32, 48))], ids=str
)
def test_a_latent_of_the_wrong_shape_is_refused_before_any_call(prediction, shape):
    model, seen = h.recording(h.exact_model(prediction))
    latent = {"samples": torch.ones(shape)}
    with pytest.raises(ValueError) as error:
        h.sample(model, "euler", h.schedule(model, 3), latent)
    right = f"3 x {h.SIZE} x {h.SIZE}" if shape[1] == 3 else "3 channels"
    for words in ("latent", " x ".join(map(str, shape[1:])), right):
        assert words in str(error.value)
    assert seen.calls == 0


def test_vae_turns_latents_into_images_and_back():
    vae = h.exact_vae()
    image = torch.rand(2, h.SIZE, h.SIZE, 3, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        latent = vae.encode(image)
        assert latent.shape == (2, 3, h.SIZE, h.SIZE)
        torch.testing.assert_close(latent, image.movedim(-1, 1) * 2 - 1, rtol=0, atol=1e-6)
        torch.testing.assert_close(vae.decode(latent), image, rtol=0, atol=1e-6)


def test_latent_format_is_invertible_and_centred(density):
    model = h.exact_model("flow").model
    latent = torch.rand(2, 3, h.SIZE, h.SIZE, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(model.process_latent_out(model.process_latent_in(latent)), latent)
    images = model.process_latent_out(density.sample(64, 0.0, torch.Generator().manual_seed(3)))
    assert images.abs().quantile(0.99) < 1.3 and images.std() > 0.2


def test_previews_show_the_image():
    """The host's preview of a latent in the model's units is the decoded image, to a level of grey."""
    model = h.exact_model("flow")
    x0 = model.model.density.sample(1, 0.0, torch.Generator().manual_seed(3)).float()
    latent_format = model.model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)
    with torch.inference_mode():
        shown = np.asarray(previewer.decode_latent_to_preview(x0)).astype(float)
        decoded = h.exact_vae().decode(model.model.process_latent_out(x0))[0].clamp(0, 1).numpy() * 255
    assert np.abs(shown - decoded).max() <= 1.01


def test_weights_are_small():
    assert exact.WEIGHTS.stat().st_size < 25e6


@pytest.mark.parametrize(
    "scheduler, prediction", [(scheduler, h.PREDICTIONS[i % 3]) for i, scheduler in enumerate(comfy.samplers.SCHEDULER_NAMES)]
)
def test_ksampler_makes_an_image_on_every_scheduler(scheduler, prediction):
    """What it makes lies near the image that was asked for."""
    model, condition = h.exact_model(prediction).clone(), h.conditioning(prediction, 17)
    result = h.ksampler(model, "euler", 12, scheduler, positive=condition)
    density = model.model.density
    y = model.model.process_latent_in(result.double())
    # ||y - m||^2 of a draw is the trace of the component's covariance, give or take; of another image far more.
    mean = scipy.fft.idctn(density.means[17].view(3, h.SIZE, h.SIZE).numpy(), norm="ortho")
    distance = (y - torch.from_numpy(mean)).flatten(1).norm(dim=1)
    trace = (density.band_variance @ density.band_count + density.factors[17].square().sum()) ** 0.5
    assert (distance < 3 * trace).all(), (distance, trace)


@pytest.mark.parametrize("prediction", h.KINDS)
def test_sampling_reaches_the_right_density(prediction):
    """A fine run of the host's own sampler gives typical images: log-density within the spread of exact draws."""
    model = h.exact_model(prediction)
    schedule = h.schedule(model, 40, "karras" if prediction != "flow" else "simple")[:-1]
    condition = h.conditioning(prediction, 17)
    samples = h.sampled(model, "dpmpp_2m", schedule, h.empty_latent(8), positive=condition)
    density, s = model.model.density, float(schedule[-1])
    s = s / (1 - s) if prediction == "flow" else s
    weights = density.one_hot(17)
    bits = np.array(exact.read(model, samples, schedule, weights))
    draws = density.bits_per_dim(density.sample(64, s, torch.Generator().manual_seed(4), weights), s, weights)
    assert abs(bits.mean() - draws.mean()) < 0.05


def test_conditioning_of_another_kind_is_refused():
    model = h.exact_model("flow")
    wrong = [[torch.ones(1, 1, 5), {}]]
    with pytest.raises(ValueError, match="conditioning has 5 components and the model has 128"):
        h.sampled(model, h.guided_sampler(0.2), h.schedule(model, 4), h.empty_latent(1), positive=wrong)

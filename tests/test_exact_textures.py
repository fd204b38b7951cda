"""The density over contrasts of textures: its mathematics against autograd and dense Gaussians, and the model against it."""

import math

import pytest
import torch
from density_guidance.dg_core.control import guided_steps
from density_guidance.dg_core.exact_textures import OTHER_COLOURS, ExactTextures
from density_guidance.dg_core.schedule import Schedule
from density_guidance.nodes.builtin import exact
from density_guidance.nodes.host.model_access import path_of
from density_guidance.testing import host_runs as h

SIZE = 8
LEVELS = [0.05, 1.0, 6.0, 40.0]


def photographs(count=2, size=SIZE):
    """Smooth colour noise of different brightness."""
    white = torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]).double()
    smooth = torch.fft.irfft2(torch.fft.rfft2(white) / (0.1 + frequency), s=(size, size))
    return smooth / smooth.std() + torch.linspace(-1, 1, count).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def density():
    return ExactTextures(photographs())


def points(density, count, s):
    return density.sample(count, s, torch.Generator().manual_seed(int(1000 * s) + count))


def dense(photographs, density, s):
    """The same mixture as torch's own: covariances from the circular shifts of the photographs."""
    size, means, covariances = density.size, [], []
    for photograph in photographs:
        mean = photograph.mean((1, 2))
        centred = photograph - mean[:, None, None]
        shifts = torch.stack([centred.roll((i, j), (1, 2)).flatten(1) for i in range(size) for j in range(size)])
        coloured = torch.einsum("ncp,ndq->cpdq", shifts, shifts) / size**2
        all_colours = torch.einsum("cpcq,de->dpeq", coloured, torch.eye(3, dtype=torch.float64))
        covariance = ((1 - OTHER_COLOURS) * coloured + OTHER_COLOURS * all_colours).reshape(density.dim, density.dim)
        for contrast in density.contrasts:
            means.append(mean.repeat_interleave(size**2))
            covariances.append(contrast * covariance + (density.floor**2 + s**2) * torch.eye(density.dim, dtype=torch.float64))
    normal = torch.distributions.MultivariateNormal(torch.stack(means), torch.stack(covariances))
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(len(means))), normal)


@pytest.mark.parametrize("s", LEVELS)
def test_log_prob_is_that_of_a_mixture_of_shifted_photographs(density, s):
    """With 40 frequencies every group is one of them, and the model is the random-phase model itself."""
    y = torch.cat([points(density, 3, s), points(density, 3, 2 * s)])
    expected = dense(photographs(), density, s).log_prob(y.flatten(1).double())
    torch.testing.assert_close(density.log_prob(y, s), expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("size", [8, 16, 64])
def test_groups_keep_the_energy_of_the_photographs(size):
    """Neighbours of nearly equal variance share it."""
    textures = photographs(size=size)
    density = ExactTextures(textures)
    assert density.group_count.sum(1).tolist() == [density.dim] * 2
    energy = (textures - textures.mean((2, 3), keepdim=True)).square().sum((1, 2, 3))
    energy = energy * (1 + 2 * OTHER_COLOURS)
    torch.testing.assert_close((density.group_count * density.variance).sum(1), energy)


def test_contrasts_overlap(density):
    """Their logarithms lie at most sqrt(2 / D) apart, from 0.3 to 3."""
    steps = density.contrasts.log().diff()
    assert steps.max() <= math.sqrt(2 / 192) + 1e-12
    torch.testing.assert_close(density.contrasts[[0, -1]], torch.tensor([0.3, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("s", LEVELS)
def test_score_is_the_gradient(s):
    density = ExactTextures(photographs(size=16))
    y = points(density, 2, s).requires_grad_()
    (gradient,) = torch.autograd.grad(density.log_prob(y, s).sum(), y)
    torch.testing.assert_close(density.score(y, s).detach(), gradient, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(density.denoised(y.detach(), s), y.detach() + s**2 * gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("s", LEVELS)
@pytest.mark.parametrize("texture", [None, 1])
def test_laplacian_and_hessian_products_are_second_derivatives(density, s, texture):
    weights = None if texture is None else density.one_hot(texture)
    y = points(density, 1, s)
    hessian = torch.autograd.functional.hessian(
        lambda v: density.log_prob(v.view_as(y), s, weights).sum(), y.flatten(), vectorize=True
    )
    torch.testing.assert_close(density.laplacian(y, s, weights)[0], hessian.trace(), rtol=1e-6, atol=1e-6)
    v = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = hessian @ v.flatten()
    assert (density.hessian_product(y, s, v, weights).flatten() - expected).norm() < 1e-6 * expected.norm()


def test_noise_levels_and_weights_go_with_their_image(density):
    """A batch with a level and a mixture for each image equals the images one by one."""
    y, levels = points(density, 3, 1.0), torch.tensor([0.2, 5.0, 0.2])
    weights = torch.cat([density.one_hot(0), density.one_hot(1), density.one_hot(0) + density.one_hot(1)])
    for method in (density.log_prob, density.laplacian, density.denoised):
        alone = [method(y[i : i + 1], float(levels[i]), weights[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(method(y, levels, weights), torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_draws_have_the_moments_of_the_density(density):
    weights = density.one_hot(1)
    count = 20000
    draws = density.sample(count, 0.5, torch.Generator().manual_seed(0), weights).flatten(1)
    normal = dense(photographs(), density, 0.5).component_distribution
    k = len(density.contrasts)
    covariance = normal.covariance_matrix[k:].mean(0)
    assert (draws.mean(0) - normal.mean[k]).abs().max() < 5 * (covariance.diagonal().max() / count) ** 0.5
    # Of Gaussian draws: E ||error||^2 = (tr(C)^2 + ||C||^2) / count.
    expected = ((covariance.trace() ** 2 + covariance.square().sum()) / count) ** 0.5
    assert (torch.cov(draws.T) - covariance).norm() < 1.3 * expected


def test_bad_arguments_are_named(density):
    for wrong in (torch.zeros(2, 3, 8, 9), torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 9, 9)):
        with pytest.raises(ValueError, match="photographs have shape"):
            ExactTextures(wrong)
    with pytest.raises(ValueError, match="contrasts are"):
        ExactTextures(photographs(), (3.0, 0.3))
    with pytest.raises(ValueError, match="component is 2; the density has textures 0 to 1"):
        density.one_hot(2)
    with pytest.raises(ValueError, match="y has shape"):
        density.log_prob(torch.zeros(1, 3, 16, 16), 1.0)
    with pytest.raises(ValueError, match="weights has shape"):
        density.log_prob(torch.zeros(1, 3, 8, 8), 1.0, torch.ones(1, 3))


# --- the model in the host ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", h.PREDICTIONS)
@pytest.mark.parametrize("component", [-1, 2])
@pytest.mark.parametrize("level", [0.0, 0.3, 0.9, 1.0])
def test_prediction_of_the_host_is_the_exact_one(prediction, component, level):
    model = h.texture_model(prediction)
    density, table = model.model.density, model.model.model_sampling.sigmas
    sigma = float(table[round(level * (len(table) - 1))])
    # At sigma = 1 a flow model knows only the mean of its data.
    alpha = max(1 - sigma, 1e-8) if prediction == "flow" else 1.0
    weights = None if component < 0 else density.one_hot(component)
    x0 = density.sample(2, 0.0, torch.Generator().manual_seed(8), weights)
    x = (alpha * x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(9))).float()
    context = h.texture_conditioning(prediction, component)[0][0].expand(2, -1, -1)
    with torch.inference_mode():
        result = model.model.apply_model(x, torch.full((2,), sigma), c_crossattn=context)
    expected = density.denoised(x.double() / alpha, sigma / alpha, weights)
    assert float((result - expected).abs().max() / expected.abs().max()) < 3e-5  # of float32: contrasts are sensitive


@pytest.mark.parametrize("prediction", h.KINDS)
def test_guidance_amplifies(prediction):
    """Guided from q 0.7 to 0.3 the images gain several times the bits that guidance itself adds."""
    model = h.texture_model(prediction)
    sigmas = h.schedule(model, 40, "karras")[:-1]
    latent = h.empty_latent(4, h.TEXTURE_SIZE)
    positive = h.texture_conditioning(prediction)
    bits = [
        torch.tensor(exact.read(model, h.sampled(model, h.guided_sampler(q), sigmas, latent, positive=positive), sigmas))
        for q in (0.3, 0.5, 0.7)
    ]
    assert (bits[0] > bits[1]).all() and (bits[1] > bits[2]).all()
    steps = guided_steps(Schedule(path_of(model.get_model_object("model_sampling")), sigmas.tolist()))
    added = 2 * 0.5244 * math.sqrt(2 / model.model.density.dim) * steps.log_range / math.log(2)
    assert (bits[0] - bits[2]).mean() > 3 * added


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="size is 48; textures have sizes that divide 256"):
        exact.load("flow", 48, "textures")
    with pytest.raises(ValueError, match="size is 128; the kind emoji has sizes 32, 48 and 64"):
        exact.load("flow", 128, "emoji")


def test_images_have_their_texture_and_fit_the_range():
    """Draws of each texture have the mean colour of its photograph, and few pixels are clipped."""
    model = h.texture_model("flow").model
    for component in range(len(exact.TEXTURES)):
        draws = model.density.sample(4, 0.0, torch.Generator().manual_seed(1), model.density.one_hot(component))
        images = model.process_latent_out(draws)
        torch.testing.assert_close(
            images.mean((2, 3)), (model.density.means[component] / exact.TEXTURE_SCALE).expand(4, 3), rtol=0, atol=0.01
        )
        assert (images.abs() > 1).double().mean() < 0.05

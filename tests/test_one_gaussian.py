"""One component of the exact-density model, sampled by the real host, against the converged guided flow."""

import math

import comfy.samplers
import pytest
import torch
from density_guidance.dg_core import control
from density_guidance.dg_core.schedule import Schedule
from density_guidance.dg_core.units import quantile_to_z
from density_guidance.nodes import DensityGuidanceSampler, LoadExactDensityModel
from density_guidance.nodes.builtin import exact
from density_guidance.nodes.host.model_access import path_of
from density_guidance.testing.gaussian_oracle import GaussianOracle

COMPONENT = 5
SCHEDULERS = ["karras", "exponential", "normal", "simple"]
QUANTILES = [0.05, 0.3, 0.7, 0.95]


@pytest.fixture(scope="module")
def oracle():
    model = LoadExactDensityModel.execute("flow", "32", COMPONENT, 2)[0]
    return GaussianOracle(model.model.density, COMPONENT)


def test_oracle_diagonalises_the_covariance(oracle):
    model = LoadExactDensityModel.execute("flow", "32", COMPONENT, 2)[0]
    density = model.model.density
    y = density.sample(3, 0.3, torch.Generator().manual_seed(0))
    assert oracle.log_prob(oracle.coefficients(y), 0.3).tolist() == pytest.approx(
        density.log_prob(y, 0.3, density.one_hot(COMPONENT)).tolist(), rel=1e-10
    )


@pytest.fixture(scope="module", params=["eps", "flow"])
def run(request):
    """run(sampler, scheduler, steps) -> schedule, path, and the state y at its last non-zero sigma."""
    model, _, conditioning, latent = LoadExactDensityModel.execute(request.param, "32", COMPONENT, 2).args
    sampling = model.get_model_object("model_sampling")
    path = path_of(sampling)

    def sample(sampler, scheduler, steps):
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(conditioning, conditioning)
        states = {}
        guider.sample(
            noise(latent),
            latent["samples"],
            sampler,
            sigmas,
            seed=1,
            disable_pbar=True,
            callback=lambda i, denoised, x, total: states.__setitem__(i, x),
        )
        assert len(states) == steps
        last = float(sigmas[-2])
        return sigmas.tolist(), path, states[steps - 1].double() / path.alpha(last)

    return sample


def noise(latent):
    return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(3))


def own_solver(quantile):
    return DensityGuidanceSampler.execute(quantile, 0.0, 0.0, 1.0)[0]


def guided_euler(quantile):
    return DensityGuidanceSampler.execute(quantile, 0.0, 0.0, 1.0, comfy.samplers.sampler_object("euler"))[0]


def start_noise(schedule, path):
    """What the host starts from, divided by the first sigma: EPS models take sqrt(1 + sigma^2) there."""
    unit = noise({"samples": torch.empty(2, 3, 32, 32)})
    return unit if math.isinf(path.s(schedule[0])) else unit * math.hypot(1, schedule[0]) / schedule[0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_converged_result_at_32_steps_and_twentieth_of_euler(run, oracle, scheduler):
    worst, worst_euler = 0.0, 0.0
    for quantile in (QUANTILES[0], QUANTILES[-1]):
        schedule, path, y = run(own_solver(quantile), scheduler, 32)
        _, _, y_euler = run(guided_euler(quantile), scheduler, 32)
        s = path.s(schedule[-2])
        true = oracle.converged(start_noise(schedule, path), schedule, path, quantile_to_z(quantile))
        error = lambda y: float(
            (oracle.log_prob(oracle.coefficients(y), s) - oracle.log_prob(true, s)).abs().max() / oracle.dim
        )
        worst, worst_euler = max(worst, error(y)), max(worst_euler, error(y_euler))
    print(f"{scheduler}: {worst:.1e} nats per dimension, Euler {worst_euler:.1e}")
    assert worst < 1e-3
    assert worst < worst_euler / 20


@pytest.mark.parametrize("scheduler, quantile", list(zip(SCHEDULERS, QUANTILES)) + list(zip(SCHEDULERS, QUANTILES[::-1])))
def test_shift_is_the_predicted_one_at_20_steps(run, oracle, scheduler, quantile):
    schedule, path, y = run(own_solver(quantile), scheduler, 20)
    _, _, y_neutral = run(own_solver(0.5), scheduler, 20)
    s = path.s(schedule[-2])
    measured = oracle.log_prob(oracle.coefficients(y), s) - oracle.log_prob(oracle.coefficients(y_neutral), s)
    log_range = control.guided_steps(Schedule(path, schedule)).log_range
    predicted = (2 * oracle.dim) ** 0.5 * quantile_to_z(quantile) * log_range
    assert measured == pytest.approx(predicted, rel=0.02)


def change_of_bits(prediction, size, detail_shift, steps, sampler=None):
    """Exact bits per dimension with detail_shift less those without, at the last sigma above zero."""
    model, _, conditioning, latent = LoadExactDensityModel.execute(prediction, size, COMPONENT, 2).args
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)[:-1]
    inner = sampler and comfy.samplers.sampler_object(sampler)
    bits = []
    for shift in (0.0, detail_shift):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(conditioning, conditioning)
        guided = DensityGuidanceSampler.execute(0.5, shift, 0.0, 1.0, inner)[0]
        y = guider.sample(noise(latent), latent["samples"], guided, sigmas, seed=1, disable_pbar=True)
        bits.append(torch.tensor(exact.read(model, y, sigmas, model.model.density.one_hot(COMPONENT))))
    return (bits[1] - bits[0]).tolist()


@pytest.mark.parametrize(
    "prediction, detail_shift, size", [("eps", -0.3, "32"), ("eps", 0.5, "64"), ("flow", 0.5, "32"), ("flow", -0.3, "64")]
)
def test_detail_shift_means_the_same_at_every_size(prediction, detail_shift, size):
    assert change_of_bits(prediction, size, detail_shift, 20) == pytest.approx([detail_shift] * 2, rel=0.02)


@pytest.mark.parametrize(
    "prediction, detail_shift, sampler, tolerance",
    [("eps", -0.8, None, 0.03), ("flow", -2.0, None, 0.03), ("eps", -2.0, "euler", 0.06), ("flow", -0.8, "euler", 0.06)],
)
def test_unreachable_smoothing_ends_at_the_limit(prediction, detail_shift, sampler, tolerance, caplog):
    change = change_of_bits(prediction, "32", detail_shift, 32, sampler)
    assert "the smoothest that can be reached" in caplog.text
    assert change == pytest.approx([control.SMOOTHEST] * 2, abs=tolerance)

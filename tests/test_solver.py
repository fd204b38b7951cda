"""The pack's own solver on densities whose guided flow is known."""

import math

import numpy as np
import pytest
import torch
from density_guidance.dg_core import solver
from density_guidance.dg_core.adams import History
from density_guidance.dg_core.control import guided_steps
from density_guidance.dg_core.quadrature import eps_weights
from density_guidance.dg_core.schedule import FLOW, VE, Schedule
from density_guidance.testing.gaussians import control_of_z, gaussian, geometric
from scipy.integrate import solve_ivp

DIM = 64
POINT7 = torch.tensor(0.7, dtype=torch.float64)


def run(variance, path, sigmas, z, noise):
    model, calls = gaussian(variance, path)
    schedule = Schedule(path, sigmas)
    x = solver.solve(model, noise * sigmas[0], schedule, control_of_z(schedule, z, noise[0].numel()))
    assert calls == list(dict.fromkeys(sigmas[:-1]))
    return x


@pytest.fixture
def noise():
    return torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("z", [-1.6, 0.2])
def test_isotropic_gaussian_meets_the_closed_solution(noise, z):
    """dR/ds = 2 s R / (c^2 + s^2) + 2 sqrt(2D) z (c^2 + s^2) / s, so R / (c^2 + s^2) changes by 2 sqrt(2D) z ln s."""
    c2, sigmas = 0.5, geometric(20.0, 0.05, 48)
    x = run(torch.tensor(c2, dtype=torch.float64), VE, sigmas, z, noise)
    w0 = (noise * sigmas[0]).square().flatten(1).sum(1) / (c2 + sigmas[0] ** 2)
    w1 = x.square().flatten(1).sum(1) / (c2 + sigmas[-1] ** 2)
    expected = w0 - 2 * math.sqrt(2 * DIM) * z * math.log(sigmas[0] / sigmas[-1])
    # Guidance does not turn the latent.
    assert torch.nn.functional.cosine_similarity(x.flatten(1), noise.flatten(1)).numpy() == pytest.approx(1, abs=1e-12)
    assert w1.numpy() == pytest.approx(expected.numpy(), rel=1e-3)


@pytest.mark.parametrize("path, start, stop, z", [(VE, 10.0, 0.1, -0.2), (FLOW, 0.9, 0.1, 0.1)])
def test_order(noise, path, start, stop, z):
    """The slope of error against step size, between the coarse steps and the rounding floor."""
    variance = torch.logspace(-1, 1, DIM, dtype=torch.float64).view(1, 4, 4, 4)
    s_start, s_stop = path.s(start), path.s(stop)
    k = math.sqrt(2 * DIM) * z

    def rate(log_s, flat):
        s = math.exp(log_s)
        y = torch.from_numpy(flat).view_as(noise)
        eps = s * y / (variance + s**2)
        return (s * (eps + k * eps / eps.square().flatten(1).sum(1).view(-1, 1, 1, 1))).flatten().numpy()

    y0 = noise * start / path.alpha(start)
    exact = solve_ivp(
        rate, (math.log(s_start), math.log(s_stop)), y0.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-14
    ).y[:, -1]
    errors, steps = [], [700, 1400]
    for n in steps:
        s = np.geomspace(s_start, s_stop, n + 1)
        sigmas = (s if path is VE else s / (1 + s)).tolist()
        y = run(variance, path, sigmas, z, noise) / path.alpha(sigmas[-1])
        errors.append(np.abs(y.flatten().numpy() - exact).max())
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    print(f"order {slope:.2f}, errors {errors}")
    assert slope == pytest.approx(solver.ORDER, abs=0.2)


@pytest.mark.parametrize("variance, limit", [(0.8, 1e-4), (1.0, 1e-4), (1.25, 1e-4)])
def test_few_steps_keep_the_order_where_signal_and_noise_are_alike(noise, variance, limit):
    """The variance-preserving state hardly moves there, while eps and denoised do."""
    s = geometric(20.0, 0.05, 20)
    x = run(torch.tensor(variance, dtype=torch.float64), VE, s, 0.0, noise)
    exact = noise * s[0] * math.sqrt((variance + s[-1] ** 2) / (variance + s[0] ** 2))
    assert float((x - exact).norm() / exact.norm()) < limit


def test_parameterisations_agree(noise):
    """The same flow as VE and as flow matching: x only rescales."""
    s = geometric(8.0, 0.1, 12)
    ve = run(POINT7, VE, s, -0.8, noise)
    sigmas = [v / (1 + v) for v in s]
    flow = run(POINT7, FLOW, sigmas, -0.8, noise) / FLOW.alpha(sigmas[-1])
    assert flow.numpy() == pytest.approx(ve.numpy(), rel=1e-10)


def test_flow_from_pure_noise(noise):
    """The unguided call at sigma = 1 is exact for data at a point, and finite for any."""
    x = run(torch.tensor(0.0, dtype=torch.float64), FLOW, [1.0, 0.7, 0.3, 0.1], 0.0, noise)
    assert x.numpy() == pytest.approx(0.1 * noise.numpy(), rel=1e-12)
    assert run(torch.tensor(2.0, dtype=torch.float64), FLOW, [1.0, 0.7, 0.3, 0.1], -1.0, noise).isfinite().all()


def test_last_step_to_zero_is_the_denoised_prediction(noise):
    model, _ = gaussian(torch.tensor(0.5, dtype=torch.float64), VE)
    schedule = Schedule(VE, [2.0, 0.0])
    assert guided_steps(schedule) is None
    assert torch.equal(solver.solve(model, noise, schedule), model(noise, 2.0))


def test_repeated_sigma_changes_nothing(noise):
    s = geometric(5.0, 0.2, 6)
    once = run(POINT7, VE, s, -0.8, noise)
    twice = run(POINT7, VE, s[:3] + s[2:], -0.8, noise)
    assert torch.equal(twice, once)


def test_schedule_of_one_sigma_makes_no_call(noise):
    assert torch.equal(run(POINT7, VE, [1.0], 0.0, noise), noise)


def test_mask_guides_the_region_only(noise):
    """Half of the latent guided: the rest follows the plain flow, and the half does what a smaller latent would do.

    With steps so small that the order, which the region decides, is the same in all.
    """
    s = geometric(8.0, 0.1, 48)
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    mask[..., :2] = 1
    model, _ = gaussian(POINT7, VE)
    schedule = Schedule(VE, s)
    control = control_of_z(schedule, -1.0, DIM / 2, mask)
    x = solver.solve(model, noise * s[0], schedule, control, mask=mask)
    plain = run(POINT7, VE, s, 0.0, noise)
    half = run(POINT7, VE, s, -1.0, noise[..., :2].contiguous())
    assert x[..., 2:].numpy() == pytest.approx(plain[..., 2:].numpy(), rel=1e-12)
    assert x[..., :2].numpy() == pytest.approx(half.numpy(), rel=1e-12)


def test_almost_repeated_sigma_does_no_harm(noise):
    s = geometric(5.0, 0.2, 6)
    near = run(POINT7, VE, s[:3] + [s[2] * (1 - 1e-6)] + s[3:], -0.8, noise)
    assert near.numpy() == pytest.approx(run(POINT7, VE, s, -0.8, noise).numpy(), rel=1e-3)


def test_flow_from_next_to_pure_noise(noise):
    assert run(POINT7, FLOW, [1.0, 0.99992, 0.5, 0.1], -1.0, noise).isfinite().all()


def test_a_series_begins_with_the_node_where_the_step_begins():
    """Where the limiter leaves out all else, the DDIM step is left; the whole is interpolation by all nodes."""
    history, (a, b, c) = History(eps_weights, 3), torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(1)).unbind()
    for theta, value in ((1.0, a), (0.8, b), (0.6, c)):
        history.add(theta, value, theta - 0.2)
    predicted, corrected = list(history.terms(0.6, 0.4, False)), list(history.terms(0.8, 0.6, True))
    assert torch.allclose(predicted[0], eps_weights(0.6, 0.4, [0.6])[0] * c)
    assert torch.allclose(corrected[0], eps_weights(0.8, 0.6, [0.8])[0] * b)
    whole = sum(w * v for w, v in zip(eps_weights(0.8, 0.6, [0.6, 0.8, 1.0]), (c, b, a)))
    assert torch.allclose(sum(corrected), whole, atol=1e-6) and len(predicted) == len(corrected) == 3

"""Noise at an unchanged log-density: the formulas, on Gaussians in closed form."""

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from density_guidance.dg_core import solver
from density_guidance.dg_core.control import guided_steps
from density_guidance.dg_core.schedule import FLOW, VE, Schedule
from density_guidance.dg_core.variation import (
    CORRECTIONS,
    ImageNoise,
    Variation,
    displacement,
    indices_of,
    inner,
    level_set_step,
)
from density_guidance.testing.gaussians import control_of_z, gaussian, geometric

EVERY_CORRECTION = pytest.mark.parametrize("correction", CORRECTIONS)
SHAPE = (4, 4, 4)
DIM = math.prod(SHAPE)
IMAGES = 64
C2 = 0.5


def start(seed=0):
    """One noise for all images, and as many numbers of it as there are."""
    noise = torch.randn(1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise.expand(IMAGES, -1, -1, -1)


def run(sigmas, variance, strength=1.0, correction="expected", path=VE, z=0.0, mask=None, probes=1, window=(1e9, 0)):
    """(state at the last sigma, calls)."""
    model, calls = gaussian(variance, path)
    schedule = Schedule(path, sigmas)
    variation = strength and Variation(
        guided_steps(schedule, *window), strength, ImageNoise(3, range(IMAGES)), correction, probes, mask
    )
    control = control_of_z(schedule, z, DIM) if mask is None else control_of_z(schedule, z, float(mask.sum()), mask)
    x = solver.solve(model, start() * sigmas[0], schedule, control, variation or None, mask=mask)
    return x, calls


@EVERY_CORRECTION
@pytest.mark.parametrize("path", [VE, FLOW], ids=["VE", "flow"])
@pytest.mark.parametrize("z", [0.0, -0.5])
def test_isotropic_gaussian_keeps_its_norm(correction, path, z):
    """log p is a function of w = ||y||^2 / (c^2 + s^2); noise along its surfaces turns y and keeps w.

    A scheme that corrects with the Laplacian of the whole space instead of that of the surface loses
    ln((c^2 + s_0^2) / (c^2 + s_1^2)) of w at strength 1, and one that does not correct loses D times that.
    """
    s = geometric(5.0, 0.1, 64)
    sigmas = [path.sigma(v) for v in s]
    w = {}
    for strength in (0.0, 1.0):
        x, _ = run(sigmas, torch.tensor(C2, dtype=torch.float64), strength, correction, path, z)
        y = x / path.alpha(sigmas[-1])
        w[strength] = y.square().flatten(1).sum(1) / (C2 + s[-1] ** 2)
        turned = torch.nn.functional.cosine_similarity(y.flatten(1), start().flatten(1))
        assert abs(float(turned.mean())) < 0.5 if strength else float(turned.min()) > 1 - 1e-9
    of_the_dropped_term = math.log((C2 + s[0] ** 2) / (C2 + s[-1] ** 2))
    change = w[1.0] - w[0.0]
    print(f"w changes by {float(change.mean()):+.3f}, spread {float(change.std()):.3f}; {of_the_dropped_term:.2f} without P")
    assert abs(float(change.mean())) < 0.15 * of_the_dropped_term
    assert float(change.std()) < 0.15 * of_the_dropped_term


def jump(noise, mask=None, s=0.7, s_up=0.9):
    """(foot, change, eps at the foot, theta, raised) of a jump in the exact flow of N(0, c^2 I)."""
    theta, raised = math.atan(s), math.atan(s_up)
    y = torch.randn(len(noise), *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    foot = y * math.sqrt((C2 + s_up**2) / (C2 + s**2))
    eps = s_up * foot / (C2 + s_up**2)
    change = displacement(y * math.cos(theta), foot * math.cos(raised), eps, theta, raised, noise, mask)
    return y, foot, change / math.cos(raised), eps, raised


def test_noise_is_orthogonal_to_eps_and_has_the_right_size():
    s, s_up = 0.7, 0.9
    y, foot, change, eps, _ = jump(ImageNoise(0, range(2000))(torch.empty(2000, *SHAPE, dtype=torch.float64)))
    noise = change + foot - y
    assert float(inner(noise, eps).abs().max()) < 1e-12
    size = noise.square().flatten(1).sum(1) / (s_up**2 - s**2)  # chi-square with D - 1 degrees of freedom
    assert float(size.mean()) == pytest.approx(DIM - 1, abs=4 * math.sqrt(2 * DIM / 2000))
    assert float(size.var()) == pytest.approx(2 * (DIM - 1), rel=0.15)


def test_soft_weights_scale_the_noise():
    """Orthogonal to eps as the weights count it, of the weight's size, and with the spread of its level at each element."""
    s, s_up, count = 0.7, 0.9, 2000
    weights = torch.tensor([1.0, 0.7, 0.3, 0.0], dtype=torch.float64).expand(1, *SHAPE)
    like = torch.empty(count, *SHAPE, dtype=torch.float64)
    noise = ImageNoise(0, range(count))(like)
    y, foot, change, eps, _ = jump(noise, weights)
    _, _, mirrored, _, _ = jump(-noise, weights)
    rise, path = (change - mirrored) / 2, foot + (change + mirrored) / 2  # the noise, and where along the flow it starts
    assert float(inner(rise, eps).abs().max()) < 1e-12
    for w, *parts in zip(weights[0, 0, 0].tolist(), rise.unbind(-1), path.unbind(-1), foot.unbind(-1)):
        of_rise, of_path, of_foot = (float(v.square().mean()) for v in parts)
        assert of_rise == pytest.approx(w**2 * (s_up**2 - s**2), rel=0.05)  # the projection takes 1 / D of it
        assert (of_path + of_rise) / of_foot == pytest.approx(1, abs=0.012)


def test_step_to_the_level_set_is_that_of_the_gaussian():
    """log p(top') = log p(foot) up to the third order of the noise or better: at half of it an eighth of the error is left."""
    errors = []
    noise = ImageNoise(0, range(64))(torch.empty(64, *SHAPE, dtype=torch.float64))
    for s_up in (0.9, 0.755):
        _, foot, change, eps, raised = jump(noise, s_up=s_up)
        top = foot + change
        eps_top = s_up * top / (C2 + s_up**2)
        scale = math.cos(raised)
        after, eps_after = level_set_step(foot * scale, change * scale, eps, eps_top)
        after = after / scale
        assert eps_after.numpy() == pytest.approx((s_up * after / (C2 + s_up**2)).numpy(), rel=0.05, abs=0.05)

        def log_p(y):
            return -0.5 * y.square().flatten(1).sum(1) / (C2 + s_up**2)

        assert float((log_p(top) - log_p(foot)).abs().mean()) > 0.1
        errors.append(float((log_p(after) - log_p(foot)).abs().mean()))
    print(f"errors of log p: {errors}")
    assert errors[0] < 0.05 and errors[1] < errors[0] / 8


@pytest.mark.parametrize("eps_top_size", [0.0, 0.1, 1.0, 10.0])
def test_step_to_the_level_set_is_bounded(eps_top_size):
    """Feet and tops that know nothing of each other."""
    foot, change, eps_foot, eps_top = torch.randn(
        4, 8, 2, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    eps_top = eps_top_size * eps_top
    stepped, eps = level_set_step(foot, change, eps_foot, eps_top)
    step, room, moved, size = (v.flatten(1).norm(dim=1) for v in (stepped - foot - change, change, eps - eps_top, eps_top))
    most = 0.5 * (1 + 0.5 / 2) * (1 + 1e-9)
    assert (step <= most * room).all() and (moved <= most * size).all()


@EVERY_CORRECTION
def test_mask_keeps_the_noise_inside(correction):
    """Outside, the plain flow; inside, what a latent of that part alone would do."""
    s = geometric(5.0, 0.1, 16)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask[..., :2] = 1
    variance = torch.tensor(C2, dtype=torch.float64)
    plain, _ = run(s, variance, 0.0)
    x, _ = run(s, variance, 1.0, correction, mask=mask.expand(1, *SHAPE))
    assert x[..., 2:].numpy() == pytest.approx(plain[..., 2:].numpy(), rel=1e-2)  # the plain flow in other steps
    inside, whole = (v[..., :2].square().flatten(1).sum(1) for v in (x, plain))
    assert float((x - plain)[..., :2].abs().mean()) > 0.1
    assert inside.numpy() == pytest.approx(whole.numpy(), rel=0.1)


@pytest.mark.parametrize("strength, window", [(0.0, (1e9, 0)), (1.0, (0.01, 0.001))], ids=["strength 0", "empty window"])
@EVERY_CORRECTION
def test_nothing_to_add_is_the_plain_solver(strength, window, correction):
    s = [*geometric(5.0, 0.1, 12), 0.0]
    variance = torch.logspace(-1, 1, DIM, dtype=torch.float64).view(1, *SHAPE)
    schedule, (model, calls) = Schedule(VE, s), gaussian(variance, VE)
    steps = guided_steps(schedule, *window)
    variation = steps and Variation(steps, strength, ImageNoise(3, range(IMAGES)), correction)
    x = solver.solve(model, start() * s[0], schedule, control_of_z(schedule, -0.3, DIM), variation)
    plain, plain_calls = run(s, variance, 0.0, z=-0.3)
    assert torch.equal(x, plain) and calls == plain_calls == s[:-1]


@pytest.mark.parametrize(
    "correction, probes, extra",
    [("expected", 1, 0), ("expected", 5, 0), ("hutchinson", 1, 1), ("hutchinson", 3, 3), ("exact", 1, 2), ("exact", 2, 4)],
)
def test_model_calls(correction, probes, extra):
    """Only steps with noise call more often, and none at more than the first level."""
    s = [*geometric(5.0, 0.1, 12), 0.0]
    window = (s[3], s[7])
    _, calls = run(s, torch.tensor(C2, dtype=torch.float64), 1.0, correction, probes=probes, window=window)
    assert len(calls) == 12 + 1 + 4 * extra
    outside = [v for v in calls if v > s[3] * math.sqrt(2) or v < s[7] * (1 + 1e-9)]
    assert outside == [v for v in s[:-1] if v > s[3] * math.sqrt(2) or v < s[7] * (1 + 1e-9)]
    _, calls = run(s, torch.tensor(C2, dtype=torch.float64), 3.0, correction, probes=probes)
    assert max(calls) == pytest.approx(s[0])


def test_levels():
    schedule = Schedule(VE, [8.0, 4.0, 2.0, 1.0, 0.5, 0.0])
    steps = guided_steps(schedule)

    def levels(step, *args):
        return Variation(steps, *args).raised_levels(schedule, step)

    assert levels(0, 1.0, None, "exact", 1) == []  # already the highest level
    assert levels(4, 1.0, None, "exact", 1) == []  # the last step to zero
    assert levels(2, 0.5, None, "exact", 1) == [pytest.approx(math.sqrt(4 + 0.25 * 3))]
    assert levels(2, 0.5, None, "hutchinson", 3) == [pytest.approx(math.sqrt(4 + 0.25 * k)) for k in (1, 2, 3)]
    assert levels(1, 3.0, None, "exact", 1) == [pytest.approx(8.0)]
    assert levels(1, 0.5, None) == [pytest.approx(math.sqrt(16 + 0.25 * 15))]  # for two steps
    assert levels(2, 0.5, None) == []
    assert levels(3, 0.5, None) == [pytest.approx(math.sqrt(1 + 0.25 * 0.75))]


@lru_cache
def converged():
    """The plain flow of `test_order` in 800 steps."""
    return run(geometric(10, 0.1, 800), torch.logspace(-2, 2, DIM, dtype=torch.float64).view(1, *SHAPE), 0.0)[0]


@EVERY_CORRECTION
def test_order(correction):
    """Weak error of the log-density against the step, on a Gaussian of many scales: asymptotically first order."""
    variance = torch.logspace(-2, 2, DIM, dtype=torch.float64).view(1, *SHAPE)

    def log_p(x, s):
        return -0.5 * (x.square() / (variance + s**2)).flatten(1).sum(1)

    true = log_p(converged(), 0.1)
    steps, errors = (24, 48, 96, 192), []
    for n in steps:
        change = (log_p(run(geometric(10, 0.1, n), variance, 0.5, correction)[0], 0.1) - true) / DIM
        errors.append(float(change.mean()))
        assert abs(errors[-1]) > 4 * float(change.std()) / math.sqrt(IMAGES)  # else it says nothing about the order
    slope = -np.polyfit(np.log(steps), np.log(np.abs(errors)), 1)[0]
    print(f"{correction}: weak order {slope:.2f}, errors {errors}")
    assert slope == pytest.approx(0.85, abs=0.25)
    assert abs(errors[0]) < 4e-3


# --- noise --------------------------------------------------------------------------------------------------------


def test_noise_of_an_image_depends_on_seed_and_index_alone():
    like = torch.empty(3, 2, 5)
    a, b = ImageNoise(7, [4, 0, 9]), ImageNoise(7, [9, 4])
    for _ in range(3):
        x, y = a(like), b(like[:2])
        assert torch.equal(x[0], y[1]) and torch.equal(x[2], y[0])
        assert not torch.equal(x[0], x[1])
    again, other = ImageNoise(7, [4])(like[:1]), ImageNoise(8, [4])(like[:1])
    assert not torch.equal(again, x[:1])  # a new draw at every call
    assert torch.equal(again, ImageNoise(7, [4])(like[:1])) and not torch.equal(again, other)
    assert torch.equal(ImageNoise(7, [4])(like[:1].bfloat16()), again.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_an_image_is_known_by_its_starting_noise(dtype):
    noise = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    a, b, c = indices_of(noise)
    assert len({a, b, c}) == 3
    assert indices_of(noise[[2, 0]]) == [c, a] and indices_of(noise.transpose(1, 2).contiguous().transpose(1, 2)) == [a, b, c]
    first, second, other = indices_of(noise[[1, 1, 0]])
    assert (first, other) == (b, a) and second not in (a, b, c)


def test_noise_is_not_the_initial_noise():
    for seed in range(20):
        initial = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(seed))
        for index in range(3):
            correlation = float((ImageNoise(seed, [index])(initial) * initial).mean())
            assert abs(correlation) < 5 / 16


def test_noise_is_standard_normal():
    x = ImageNoise(0, range(400))(torch.empty(400, 256, dtype=torch.float64))
    assert float(x.mean()) == pytest.approx(0, abs=4 / math.sqrt(x.numel()))
    assert float(x.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / x.numel()))
    mean = x.mean(0)
    assert float(mean.square().mean() * 400) == pytest.approx(1, abs=4 * math.sqrt(2 / 256))  # images are independent


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"strength": -0.1}, ["strength", "-0.1", "0.0", "3.0"]),
        ({"strength": math.nan}, ["strength", "nan"]),
        ({"correction": "none"}, ["correction", "'none'", "expected", "hutchinson", "exact"]),
        ({"probes": 0}, ["probes", "0", "1", "16"]),
        ({"probes": 1.5}, ["probes", "1.5", "whole"]),
    ],
    ids=str,
)
def test_bad_values_are_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        Variation(**{"steps": None, "strength": 1.0, "noise": None, **kwargs})
    assert all(word in str(error.value) for word in words)

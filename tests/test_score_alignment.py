"""Score alignment on densities with a closed form, and on small mixtures, in float64."""

import math

import pytest
import torch
from density_guidance.dg_core import alignment, divergence
from density_guidance.dg_core.levels import noise_levels
from density_guidance.dg_core.schedule import FLOW, VE, Schedule
from density_guidance.dg_core.solver import solve
from density_guidance.testing.mixtures import Mixture

S_START, S_END = 40.0, 0.05
PATHS = pytest.mark.parametrize("path", [VE, FLOW], ids=lambda c: c.kind)


def nodes(count, path, dim=4):
    """`count` sigmas, placed as the node does; a flow begins at infinite s."""
    levels = noise_levels(S_END, S_START if path is VE else math.inf, count, dim)
    return [path.sigma(s) for s in reversed(levels)]


def start(count, dim, path, generator):
    """(noise, x) as the host would start."""
    noise = torch.randn(count, dim, dtype=torch.float64, generator=generator)
    return noise, noise * (math.hypot(1, S_START) if path is VE else 1)


def check(mixture, x, sigmas, path, probes=None, method=divergence.FORWARD):
    """The `Profile` of a whole schedule. probes(shape) -> list of probes, for the way without the score."""

    def differentiate(x, sigma, tangent):
        predict = lambda x: mixture.denoised(x, sigma, path)
        if probes is None:
            return *divergence.directional_derivative(predict, x, tangent, method), None
        return divergence.trace_derivative(predict, x, tangent, lambda _: probes(x), method)

    return alignment.trace_alignment(differentiate, None, x, -x, Schedule(path, sigmas), len(sigmas) - 1)[1]


def end_of_run(mixture, x, sigmas, path):
    """y at the last sigma."""
    y = solve(
        lambda x, sigma: mixture.denoised(x, sigma, path),
        x,
        Schedule(path, [*sigmas, sigmas[-1]]),
        order=alignment.order_of([path.s(v) for v in sigmas]),
        limit_order=False,
    )
    return y / path.alpha(sigmas[-1])


def measured(mixture, x, path, count, step=1e-4):
    """A from exact log-densities of runs with scaled noise, by differences of fourth order."""
    sigmas = nodes(count, path)
    log_p = lambda r: mixture.log_prob(end_of_run(mixture, r * x, sigmas, path), S_END)
    near, far = (log_p(1 - h) - log_p(1 + h) for h in (step, 2 * step))
    return (8 * near - far) / (12 * step)


def basis(x):
    """One probe for each dimension: their sum is the exact trace."""
    return [math.sqrt(x.shape[1]) * e.expand_as(x) for e in torch.eye(x.shape[1], dtype=x.dtype)]


@PATHS
def test_gaussian_closed_form(path):
    generator = torch.Generator().manual_seed(0)
    gaussian = Mixture.random(64, 1, 6, generator)
    _, x = start(64, 6, path, generator)
    sigmas = nodes(32, path, 6)
    profile = check(gaussian, x, sigmas, path)
    # In the eigenbasis y - m shrinks by the ratio of standard deviations; y itself is what is scaled.
    rotate = lambda v: (v[:, None] @ gaussian.bases[:, 0])[:, 0]
    variance = gaussian.variances[:, 0]
    if path is VE:
        shrink = ((variance + S_END**2) / (variance + S_START**2)).sqrt()
        centred, moved = rotate(x - gaussian.means[:, 0]) * shrink, rotate(x) * shrink
    else:
        centred = moved = rotate(x) * (variance + S_END**2).sqrt()
    score, tangent = -centred / (variance + S_END**2), -moved
    exact = (score * tangent).sum(1)
    assert ((profile.alignment[-1] - exact) / exact).abs().max() < 1e-3
    assert (profile.cosine[-1] - exact / (score.norm(dim=1) * tangent.norm(dim=1))).abs().max() < 1e-3


def test_alignment_of_a_gaussian_is_constant_along_the_run():
    """No third derivative: what the way without the score integrates vanishes."""
    gaussian = Mixture.random(8, 1, 5, torch.Generator().manual_seed(1))
    noise, x = start(8, 5, FLOW, torch.Generator().manual_seed(2))
    profile = check(gaussian, x, nodes(32, FLOW), FLOW, basis)
    assert profile.alignment_without_score[-1].tolist() == pytest.approx(noise.square().sum(1).tolist(), rel=1e-9)


@pytest.mark.parametrize("path, components, dim", [(VE, 2, 2), (FLOW, 3, 3)], ids=["VE", "flow"])
def test_verdict_on_random_mixtures(path, components, dim):
    """100 mixtures in all; the truth comes from finite scaling, and its error from another grid and step."""
    generator = torch.Generator().manual_seed(10 * components + dim + 100 * (path is FLOW))
    mixtures = Mixture.random(50, components, dim, generator)
    _, x = start(50, dim, path, generator)
    truth = measured(mixtures, x, path, 400)
    uncertain = (truth - measured(mixtures, x, path, 300, 2e-4)).abs() >= truth.abs()
    profile = check(mixtures, x, nodes(64, path), path)
    wrong = (profile.alignment[-1] > 0) != (truth > 0)
    print(f"{path.kind}: {int(uncertain.sum())} skipped, {int((truth < 0).sum())} of 50 not aligned")
    assert 3 <= int((truth < 0).sum()) <= 25 and int(uncertain.sum()) <= 2
    assert not (wrong & ~uncertain).any()
    error = ((profile.alignment[-1] - truth).abs() / (1 + truth.abs()))[~uncertain]
    assert error.median() < 1e-4 and error.quantile(0.9) < 1e-3


@PATHS
def test_narrow_beside_broad(path):
    """Noise that points to the narrow component: more of it comes closer, to a higher density. Away: aligned."""
    mixture = Mixture(
        [[0.5, 0.5]],
        [[[0.0, 0.0], [3.0, 0.0]]],
        torch.diag_embed(torch.tensor([[[1.0, 1.0], [0.01, 0.01]]], dtype=torch.float64)),
    )
    towards = torch.tensor([[0.45, 0.1], [-1.5, 0.1]], dtype=torch.float64)
    x = towards * (math.hypot(1, S_START) if path is VE else 1)
    profile = check(mixture, x, nodes(64, path), path)
    truth = measured(mixture, x, path, 400)
    assert (profile.alignment[-1] > 0).tolist() == (truth > 0).tolist() == [False, True]


@PATHS
def test_with_and_without_the_score_agree(path):
    generator = torch.Generator().manual_seed(4)
    mixtures = Mixture.random(64, 3, 4, generator)
    _, x = start(64, 4, path, generator)
    profile = check(mixtures, x, nodes(128, path), path, basis)
    with_score, without = profile.alignment[-1], profile.alignment_without_score[-1]
    assert ((with_score - without).abs() / (1 + with_score.abs())).max() < 3e-4


@PATHS
def test_finite_scaling_agrees_to_second_order(path):
    generator = torch.Generator().manual_seed(5)
    mixtures = Mixture.random(32, 2, 3, generator)
    _, x = start(32, 3, path, generator)
    sigmas = nodes(128, path)
    profile = check(mixtures, x, sigmas, path)
    errors = []
    for h in (0.02, 0.01, 0.005):
        less, more = (end_of_run(mixtures, x * r, sigmas, path) for r in (1 - h, 1 + h))
        found, cosine = alignment.finite_alignment(less, more, mixtures.score((less + more) / 2, S_END), h)
        errors.append((found - profile.alignment[-1]).abs())
    slope = (errors[0] / errors[2]).log2() / 2
    assert slope.median() == pytest.approx(2, abs=0.1)
    assert (errors[2] / (1 + profile.alignment[-1].abs())).median() < 1e-4
    assert (cosine - profile.cosine[-1]).abs().median() < 1e-4


@PATHS
def test_response_and_scale(path):
    """The predicted change for 1% more noise, and the scale for a wanted change, against exact log-densities."""
    dim = 6
    generator = torch.Generator().manual_seed(6)
    mixtures = Mixture.random(64, 2, dim, generator)
    _, x = start(64, dim, path, generator)
    sigmas = nodes(64, path)
    a = check(mixtures, x, sigmas, path).alignment[-1]
    bits = lambda r: mixtures.log_prob(end_of_run(mixtures, x * r, nodes(400, path), path), S_END) / (-dim * math.log(2))
    change = bits(1.005) - bits(0.995)
    assert ((alignment.percent_response(a, dim) - change).abs() < 0.05 * change.abs()).double().mean() >= 0.9
    aligned = a > 0
    r = alignment.scale_for_shift(0.02, a, dim)
    assert torch.equal(r.isnan(), ~aligned)
    shift = bits(r.nan_to_num(1.0)[:, None]) - bits(1.0)
    assert ((shift - 0.02).abs() < 0.1 * 0.02)[aligned].double().mean() >= 0.8


def test_scale_is_exact_for_centred_gaussian_data():
    generator = torch.Generator().manual_seed(7)
    gaussian = Mixture.random(16, 1, 4, generator)
    gaussian.means.zero_()
    noise, _ = start(16, 4, FLOW, generator)
    a = noise.square().sum(1)
    for shift in (-0.1, 0.3):
        r = alignment.scale_for_shift(shift, a, 4)
        density = lambda r: gaussian.log_prob(
            (gaussian.bases[:, 0] @ ((gaussian.variances[:, 0] + S_END**2).sqrt() * noise)[..., None])[..., 0] * r, S_END
        )
        reachable = (r > alignment.SCALE_RANGE[0]) & (r < alignment.SCALE_RANGE[1])
        assert reachable.sum() >= 8
        found = (density(1.0) - density(r[:, None])) / (4 * math.log(2))
        assert found[reachable].tolist() == pytest.approx([shift] * int(reachable.sum()), abs=1e-10)


def test_scale_beyond_reach_is_clamped():
    a = torch.tensor([10.0, 10.0, -3.0], dtype=torch.float64)
    assert alignment.scale_for_shift(100.0, a, 10)[:2].tolist() == [2.0, 2.0]
    assert alignment.scale_for_shift(-100.0, a, 10)[:2].tolist() == [0.5, 0.5]
    assert alignment.scale_for_shift(0.0, a, 10)[:2].tolist() == [1.0, 1.0]


def test_where_alignment_is_lost():
    cosine = torch.tensor([[1.0, 1, 1, 1], [0.5, -0.1, -1, 0.2], [0.2, 0.3, -1, -0.1], [0.1, 0.2, -1, math.nan]])
    assert alignment.lost_at(cosine).tolist() == [-1, -1, 1, 2]


@pytest.mark.parametrize(
    "sigmas, stop", [([3.0, 3.0, 1.0], 2), ([3.0, 1.0, 0.0], 2), ([3.0, 1.0], 0), ([3.0, 1.0], 2)], ids=str
)
def test_bad_schedules(sigmas, stop):
    with pytest.raises(ValueError, match=f"stop is {stop}"):
        alignment.trace_alignment(None, None, torch.ones(1, 2), torch.ones(1, 2), Schedule(VE, sigmas), stop)


def test_samples_do_not_depend_on_the_stop():
    """After it the flow goes on alone, with one call per step."""
    generator = torch.Generator().manual_seed(8)
    mixture = Mixture.random(4, 2, 3, generator)
    _, x = start(4, 3, FLOW, generator)
    sigmas, calls = [*nodes(12, FLOW), 0.0], []

    def predict(x, sigma):
        calls.append(sigma)
        return mixture.denoised(x, sigma, FLOW)

    differentiate = lambda x, sigma, w: (
        *divergence.directional_derivative(lambda x: mixture.denoised(x, sigma, FLOW), x, w, divergence.FORWARD),
        None,
    )
    ends = [alignment.trace_alignment(differentiate, predict, x, -x, Schedule(FLOW, sigmas), stop)[0] for stop in (4, 11)]
    assert calls == sigmas[5:12]
    assert torch.equal(*ends)
    order = alignment.order_of([FLOW.s(v) for v in sigmas[:-1]])
    assert torch.equal(
        ends[0],
        solve(lambda x, sigma: mixture.denoised(x, sigma, FLOW), x, Schedule(FLOW, sigmas), order=order, limit_order=False),
    )


# --- the derivative of the trace ----------------------------------------------------------------------------------


def in_parts(mixture, y, s):
    """denoised of several copies of the batch, in y's dtype; the arithmetic is float64."""
    return torch.cat([mixture.denoised(part.double(), s, VE) for part in y.split(len(mixture.means))]).to(y.dtype)


@pytest.mark.parametrize("method", divergence.METHODS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.float32, 0.02)])
def test_trace_derivative(method, dtype, tolerance):
    """Against differences of the exact trace, in float64."""
    generator = torch.Generator().manual_seed(9)
    mixture = Mixture.random(16, 3, 4, generator)
    s = 1.0
    y = 1.5 * torch.randn(16, 4, dtype=torch.float64, generator=generator)
    v = torch.randn(16, 4, dtype=torch.float64, generator=generator)
    predict = lambda y: in_parts(mixture, y, s)

    def trace(y):
        columns = [torch.func.jvp(lambda y: mixture.denoised(y, s, VE), (y,), (e.expand_as(y),))[1] for e in torch.eye(4).to(y)]
        return sum(column[:, i] for i, column in enumerate(columns))

    h = 1e-4
    exact = (8 * (trace(y + h * v) - trace(y - h * v)) - trace(y + 2 * h * v) + trace(y - 2 * h * v)) / (12 * h)
    steps = divergence.trace_steps(y, v, torch.float32, method, s)
    scale = 1e-1 if dtype is torch.float64 else 1
    value, slope, found = divergence.trace_derivative(
        predict, y.to(dtype), v.to(dtype), lambda _: [p.to(dtype) for p in basis(y)], method, tuple(scale * a for a in steps)
    )
    torch.testing.assert_close(value.double(), predict(y), rtol=1e-5, atol=1e-5)
    derivative = torch.func.jvp(lambda y: mixture.denoised(y, s, VE), (y,), (v,))[1]
    assert (slope.double() - derivative).norm() < tolerance * derivative.norm()
    assert (found.double() - exact).norm() < tolerance * exact.norm()


def test_steps_lie_between_rounding_and_bending():
    """In float32 the chosen step errs by less than 1%, and one 64 times smaller or larger by five times as much."""
    generator = torch.Generator().manual_seed(11)
    mixture = Mixture.random(64, 3, 4, generator)
    s = 1.0
    y, v = (k * torch.randn(64, 4, dtype=torch.float64, generator=generator) for k in (1.5, 1.0))

    def run(dtype, factor, method):
        steps = tuple(factor * a.to(dtype) for a in divergence.trace_steps(y, v, torch.float32, method, s))
        return divergence.trace_derivative(
            lambda y: in_parts(mixture, y, s),
            y.to(dtype),
            v.to(dtype),
            lambda _: [p.to(dtype) for p in basis(y)],
            method,
            steps,
        )[2].double()

    for method in divergence.METHODS:
        exact = run(torch.float64, 0.02, method)
        errors = [float((run(torch.float32, k, method) - exact).norm() / exact.norm()) for k in (1 / 64, 1, 64)]
        print(method, errors)
        assert errors[1] < 0.01 and min(errors[0], errors[2]) > 5 * errors[1]


def test_stratified_probes_leave_every_trace_as_it_is():
    """The mean over all sign patterns is the trace, whatever the direction."""
    dim = 4
    generator = torch.Generator().manual_seed(12)
    matrix = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * (dim + 2))
    directions = 3 * torch.randn(2, dim, dtype=torch.float64, generator=generator)
    probes = divergence.stratified(
        patterns[:, :dim], [d.expand(len(patterns), dim) for d in directions], [patterns[:, dim], patterns[:, dim + 1]]
    )
    values = torch.einsum("bi,ij,bj->b", probes, matrix, probes)
    assert float(values.mean()) == pytest.approx(float(matrix.trace()), rel=1e-12)
    # and of a matrix of rank one along the first direction, or along what the second adds to it, no value differs
    second = directions[1] - directions[0] * (directions[0] @ directions[1]) / directions[0].square().sum()
    for direction in (directions[0], second):
        along = direction[:, None] * direction
        assert torch.einsum("bi,ij,bj->b", probes, along, probes).std() < 1e-12 * along.trace()


def test_stratified_along_nothing_is_the_probe():
    probe = divergence.rademacher(torch.zeros(2, 5), 0, 0)
    assert torch.equal(divergence.stratified(probe, [torch.zeros(2, 5)], [torch.zeros(2)]), probe)


def test_signs_belong_to_the_image():
    x = torch.zeros(3, 4)
    signs = divergence.random_signs(5, 2, 0, None, x)
    assert torch.equal(signs[2:], divergence.random_signs(5, 2, 0, [2], x[:1])) and set(signs.tolist()) <= {-1.0, 1.0}
    many = torch.cat([divergence.random_signs(5, call, place, None, x) for call in range(100) for place in range(2)])
    first = torch.cat([divergence.rademacher(x, 5, call)[:, 0] for call in range(200)])
    assert abs(float(many.mean())) < 4 / 600**0.5 and abs(float((many * first).mean())) < 4 / 600**0.5

"""Formulas of dg_core: units, path, guided range, eta."""

import math

import pytest
import scipy.stats
import torch
from density_guidance.dg_core import control, units
from density_guidance.dg_core.schedule import FLOW, VE, NoisePath, Schedule, log_snr
from density_guidance.dg_core.statistics import dimension, squared_norm
from hypothesis import given
from hypothesis import strategies as st

SCHEDULE = [10.0, 5.0, 2.0, 1.0, 0.5, 0.0]


@given(st.floats(-3, 3), st.integers(1, 10**9))
def test_bits_per_dim_round_trip(bits, dim):
    assert units.nats_to_bits_per_dim(units.bits_per_dim_to_nats(bits, dim), dim) == pytest.approx(bits, abs=1e-12)


def test_bits_per_dim_of_a_fair_coin():
    """D independent coins have log p = -D ln 2: one bit each."""
    assert units.nats_to_bits_per_dim(-100 * math.log(2), 100) == pytest.approx(1)


@given(st.floats(0.001, 0.999))
def test_quantile_to_z_inverts_the_normal_distribution(q):
    assert 0.5 * math.erfc(-units.quantile_to_z(q) / math.sqrt(2)) == pytest.approx(q, rel=1e-9)


def test_neutral_quantile_is_exactly_zero():
    assert units.quantile_to_z(0.5) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, 1, -0.1, "a", None])
def test_bad_quantile_is_named(value):
    with pytest.raises(ValueError, match=r"quantile is .*; it must"):
        units.quantile_to_z(value)


@given(st.floats(0.05, 0.95), st.floats(0.01, 50))
def test_flow_and_ve_agree_on_eps_and_score(sigma, scale):
    """The same point seen as x of a flow model and as y in VE coordinates has the same eps."""
    x = scale * torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    denoised = torch.roll(x, 1, 0)
    alpha, s = FLOW.alpha(sigma), FLOW.s(sigma)
    flow, ve = FLOW.at(sigma).eps(x, denoised), VE.at(s).eps(x / alpha, denoised)
    assert torch.allclose(flow, ve, rtol=1e-10, atol=1e-9)
    assert torch.allclose(denoised, x / alpha - s * ve, rtol=1e-8, atol=1e-8)  # Tweedie, with the score -eps / s


def test_a_noise_scale_is_part_of_the_noise():
    """x = (1 - sigma) x0 + 8 sigma n has the eps of the same state with s eight times as large."""
    x, denoised = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    scaled = NoisePath("flow", 8.0)
    level = scaled.at(0.25)
    assert level.s == pytest.approx(8 / 3) and scaled.sigma(level.s) == pytest.approx(0.25)
    assert NoisePath("VE", 8.0).sigma(NoisePath("VE", 8.0).s(2.0)) == 2.0
    assert torch.allclose(level.eps(x, denoised), VE.at(level.s).eps(x / 0.75, denoised), rtol=1e-12)
    steps = control.guided_steps(Schedule(scaled, [0.5, 0.25, 0.1]))
    found = control.guided_prediction(control.Control(steps, 30.0), scaled, x, denoised, torch.tensor([0.25]).double())
    eps = level.eps(x, denoised)
    eta = 30.0 / eps.square().flatten(1).sum(1).view(-1, 1, 1)
    assert torch.allclose(found, denoised - eta * level.s * eps, rtol=1e-12)


def test_log_snr():
    assert log_snr(0.5) == pytest.approx(2 * math.log(2))
    assert FLOW.s(1.0) == math.inf


def guided_steps(sigmas, path, *window):
    return control.guided_steps(Schedule(path, sigmas), *window)


def guided(x, denoised, sigma, sigmas=SCHEDULE, path=VE, z=-20.0, weights=None, low=0.0, high=math.inf):
    """`guided_prediction` with the z of one image or of each."""
    steps = guided_steps(sigmas, path, high, low)
    gain = (2 * x[0].numel()) ** 0.5 * (z.to(x.dtype) if torch.is_tensor(z) else z)
    sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1)
    return control.guided_prediction(control.Control(steps, gain, weights), path, x, denoised, sigma)


@pytest.mark.parametrize(
    "high, low, first, last",
    [
        (math.inf, 0.0, 0, 4),  # the step to zero is never guided
        (5.0, 0.0, 1, 4),
        (math.inf, 1.0, 0, 3),  # a step that starts at the end of the window is outside
        (0.4, 0.0, 0, 0),
    ],
)
def test_guided_range_in_ve(high, low, first, last):
    r = guided_steps(SCHEDULE, VE, high, low)
    if last:
        assert (r.first, r.last) == (first, last)
        assert (r.s_start, r.s_end) == (SCHEDULE[first], SCHEDULE[last])
        assert r.log_range == pytest.approx(math.log(SCHEDULE[first] / SCHEDULE[last]))
    else:
        assert r is None


def test_guided_range_of_a_flow_starts_below_pure_noise():
    r = guided_steps([1.0, 0.8, 0.5, 0.0], FLOW)
    assert (r.first, r.last, r.s_start, r.s_end) == (1, 2, pytest.approx(4), pytest.approx(1))


@pytest.mark.parametrize("sigmas", [[1.0, 2.0], [math.nan, 0.0], [math.inf, 1.0], [1.0, -1.0]])
def test_bad_schedule_is_named(sigmas):
    with pytest.raises(ValueError, match="sigmas are"):
        Schedule(VE, sigmas)


@given(st.floats(-0.6, 2), st.integers(10, 10**6), st.floats(0.5, 9))
def test_detail_shift_is_what_is_predicted(shift, dim, log_range):
    """The gain of a wanted shift, put back into the predicted shift, is the wanted one in bits per dimension."""
    if abs(shift) > log_range / math.log(2):
        with pytest.raises(ValueError, match=f"detail_shift is {shift}"):
            control.gain_of(0.5, shift, dim, log_range)
        return
    gain, cut = control.gain_of(0.5, shift, dim, log_range)
    assert units.nats_to_bits_per_dim(gain * log_range, dim) == pytest.approx(shift, abs=1e-9)
    assert not cut


def test_statistics_per_image_and_masked():
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(3, 1, 5, 6)
    mask[..., :2] = 1
    assert dimension(x) == [120, 120, 120]
    assert dimension(x, mask) == [40, 40, 40]
    assert squared_norm(x).tolist() == pytest.approx([float((i * i).sum()) for i in x])
    assert squared_norm(x, mask).tolist() == pytest.approx([float((i[..., :2] ** 2).sum()) for i in x], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_of_a_narrow_latent_does_not_overflow_or_round(dtype):
    x = torch.full((1, 16, 128, 128), 30.0, dtype=dtype)
    assert squared_norm(x).item() == pytest.approx(900 * x.numel(), rel=1e-6)


@pytest.mark.parametrize("path, sigma", [(VE, 3.0), (FLOW, 0.75)])
def test_guided_prediction_moves_euler_along_eta_eps(path, sigma):
    """An Euler step in the host's units with the guided prediction is y + (s' - s) eta eps."""
    g = torch.Generator().manual_seed(4)
    x, denoised = (torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=g) for _ in range(2))
    schedule, z, dim, next_sigma = [sigma, 0.5 * sigma, 0.25 * sigma], -1.3, x[0].numel(), 0.5 * sigma
    result = guided(x, denoised, [sigma, sigma], schedule, path, z)
    stepped = x + (x - result) / sigma * (next_sigma - sigma)
    alpha, s = path.alpha(sigma), path.s(sigma)
    y, s_next = x / alpha, path.s(next_sigma)
    eps = (y - denoised) / s
    eta = 1 + math.sqrt(2 * dim) * z / eps.square().flatten(1).sum(1).view(-1, 1, 1, 1)
    expected = (y + (s_next - s) * eta * eps) * path.alpha(next_sigma)
    assert torch.allclose(stepped, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "path, changed", [(VE, {8.0: True, 4.0: True, 1.0: False}), (FLOW, {1.0: False, 0.75: True, 0.1: False})]
)
@pytest.mark.parametrize("z", [-1.3, torch.tensor([-1.3, 0.5, 2.0])], ids=["one z", "z of each"])
def test_weights_of_one_change_nothing_and_an_image_without_noise_is_not_guided(path, changed, z):
    x, denoised = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(10)).unbind()
    *_, low = changed
    for sigma, expected in changed.items():
        denoised[1] = x[1] / max(path.alpha(sigma), 0.01)  # eps = 0
        without, ones = (
            guided(x, denoised, [sigma] * 3, [*changed, 0.05], path, z, weights, low)
            for weights in (None, torch.ones(1, 1, 1, 1))
        )
        assert torch.allclose(without, ones, rtol=1e-6, atol=1e-6)
        assert torch.allclose(without[1], denoised[1])
        assert torch.equal(without, denoised) != expected


@pytest.mark.parametrize("weights", [None, torch.ones(1, 1, 1, 1)], ids=["all", "weighted"])
def test_next_to_no_noise_is_guided_to_a_finite_prediction(weights):
    x, denoised = torch.full((2, 4, 8, 8), 1e-22), torch.zeros(2, 4, 8, 8)
    assert guided(x, denoised, [2.0, 2.0], weights=weights).isfinite().all()


def test_a_batch_of_another_size_is_guided_right_or_refused():
    x, denoised = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(12)).unbind()
    both = guided(x, denoised, [2.0, 2.0])
    assert torch.equal(guided(x[1:], denoised[1:], [2.0]), both[1:])
    assert torch.equal(guided(x, denoised, [2.0]), both)
    with pytest.raises(ValueError, match="gain has 2 numbers and the batch has 1 images"):
        guided(x[1:], denoised[1:], [2.0], z=torch.tensor([-20.0, 1.0]))


@pytest.mark.parametrize("shape", [(16, 3, 17, 19), (16, 4, 31, 33)])
def test_an_image_is_guided_alike_wherever_it_lies_in_a_batch(shape):
    """Its memory begins elsewhere there: these sizes are no multiple of what a processor takes at once."""
    x, denoised = torch.randn(2, *shape, generator=torch.Generator().manual_seed(11)).unbind()
    alone = [guided(x[i : i + 1].clone(), denoised[i : i + 1].clone(), [2.0]) for i in range(len(x))]
    assert torch.equal(torch.cat(alone), guided(x, denoised, [2.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_prediction_is_guided_in_float32_and_rounded_once(dtype):
    x, denoised = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(13)).to(dtype).unbind()
    assert torch.equal(guided(x, denoised, [2.0]), guided(x.float(), denoised.float(), [2.0]).to(dtype))


def test_prediction_outside_the_range_is_unchanged():
    x, denoised = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5)).unbind()
    for sigma, changed in ((5.0, False), (4.0, True), (1.5, True), (1.0, False)):
        out = guided(x, denoised, sigma, [8.0, 4.0, 2.0, 1.0, 0.0], z=-1.0, high=4.0)
        assert torch.equal(out, denoised) != changed


def test_a_range_from_the_first_step_covers_what_a_churning_sampler_asks_above_it():
    x, denoised = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5)).unbind()
    assert not torch.equal(guided(x, denoised, 4.2, [4.0, 2.0, 1.0, 0.0]), denoised)


def test_pure_noise_of_a_flow_is_unguided():
    x, denoised = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(6)).unbind()
    assert torch.equal(guided(x, denoised, 1.0, [1.0, 0.8, 0.5, 0.0], FLOW), denoised)


def test_typical_noise_shift_is_the_quantile():
    """h = (||n||^2 - D) / sqrt(2D) of pure noise is standard normal: eta's normalisation."""
    n = torch.randn(4000, 64, generator=torch.Generator().manual_seed(7))
    h = (squared_norm(n) - 64) / math.sqrt(128)
    assert abs(float(h.mean())) < 4 / math.sqrt(4000)
    assert float(h.std()) == pytest.approx(1, abs=0.06)
    assert scipy.stats.norm.cdf(units.quantile_to_z(0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_range_holds_for_narrow_sigmas(dtype):
    """The host passes sigma in the latent's dtype: rounded, it must still fall into the same steps."""
    schedule = [14.6146, 8.33, 4.7, 2.117, 0.5029, 0.0]
    x, denoised = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(8)).to(dtype).unbind()
    changed = [not torch.equal(guided(x, denoised, v, schedule, z=-3.0), denoised) for v in schedule[:-1]]
    assert changed == [True, True, True, True, False]


def test_pure_noise_of_a_flow_next_to_a_close_sigma():
    x, denoised = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(9)).unbind()
    assert torch.equal(guided(x, denoised, 1.0, [1.0, 0.99992, 0.5, 0.0], FLOW), denoised)


def test_smoothing_stops_short_of_the_peak():
    """A typical Gaussian sample is D / 2 nats below the peak."""
    assert -control.SMOOTHEST * math.log(2) < 0.5
    for d in (3072, 12288):
        for quantile, shift, expected in ((0.5, -2.0, True), (0.001, 0.0, False), (0.7, 0.0, False)):
            gain, cut = control.gain_of(quantile, shift, d, 6.0)
            bits = units.nats_to_bits_per_dim(gain * 6.0, d)
            assert cut == expected
            assert bits == pytest.approx(
                control.SMOOTHEST if cut else -6 * (2 / d) ** 0.5 / math.log(2) * units.quantile_to_z(quantile)
            )


def test_a_schedule_that_begins_a_rounding_below_pure_noise():
    """sigma = 1 - 2^-24 counts as pure noise: the guided range begins at the next step."""
    below_one = 1 - 2**-24
    sigmas = [below_one, 0.9, 0.5, 0.0]
    assert FLOW.s(below_one) > 1e7
    assert guided_steps(sigmas, FLOW) == guided_steps([1.0, *sigmas[1:]], FLOW)
    assert guided_steps(sigmas, FLOW).first == 1

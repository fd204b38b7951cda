"""Directional derivatives and Hutchinson divergence, against the exact model's Hessian and on a real network."""

import itertools

import pytest
import torch
from density_guidance.dg_core import divergence
from density_guidance.dg_core.exact_density import ExactDensity
from density_guidance.nodes.builtin import exact
from density_guidance.nodes.host import model_access
from density_guidance.testing import host_runs as h
from density_guidance.testing import networks
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(scope="module")
def density():
    return ExactDensity.load(exact.WEIGHTS, 16)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("method, bound", [(divergence.FORWARD, 1e-8), (divergence.DIFFERENCES, 3e-4)])
@pytest.mark.parametrize("s", [0.1, 2.0, 20.0])
def test_derivative_of_the_exact_denoiser_is_its_hessian_product(density, method, bound, s):
    """denoised = y + s^2 score, so Dhat v = v + s^2 H v."""
    y = density.sample(2, s, torch.Generator().manual_seed(3))
    v = divergence.rademacher(y, 1, 0).double()
    expected = v + s**2 * density.hessian_product(y, s, v)
    step = divergence.difference_step(y, v, torch.float32, s)
    value, slope = divergence.directional_derivative(lambda x: density.denoised(x, s), y, v, method, step)
    assert torch.equal(value, density.denoised(y, s))
    assert relative(slope, expected) < bound
    assert relative((v - slope) / s, -s * density.hessian_product(y, s, v)) < 30 * bound  # J v


def test_trace_is_the_mean_over_all_probes():
    """Hutchinson over all 2^D signs equals the trace to rounding, for a matrix that is not symmetric."""
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
    _, slope = divergence.directional_derivative(lambda x: x @ matrix.T, torch.ones_like(probes), probes, "forward")
    assert float(divergence.probe_trace(probes, slope).mean()) == pytest.approx(float(matrix.trace()), abs=1e-12)


def test_a_denoiser_of_data_at_a_point_has_no_trace():
    """Pure noise: Dhat = 0 with any probe, so that div eps is its identity part alone."""
    y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    v = divergence.rademacher(y, 0, 0)
    _, slope = divergence.directional_derivative(lambda x: torch.zeros_like(x), y, v, "forward")
    assert divergence.probe_trace(v, slope).tolist() == [0.0, 0.0]


class _Operators(TorchDispatchMode):
    """Names of what torch runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: divergence.difference_step(x, x, torch.float32, 2.0),
        lambda x: divergence.directional_derivative(torch.sin, x, x, "differences", 0.1),
    ],
    ids=["scale", "step"],
)
def test_numbers_are_not_copied_to_the_device_as_tensors(compute):
    """A copy from the host's memory waits for the device."""
    with _Operators() as seen:
        compute(torch.ones(2, 8))
    assert seen.names and not any("lift_fresh" in name for name in seen.names)


def test_probes_depend_on_seed_image_and_call_alone():
    x = torch.empty(3, 4, 8, 8, dtype=torch.float16)
    full = divergence.rademacher(x, 5, 2)
    assert full.dtype == torch.float32 and set(full.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(divergence.rademacher(x[:1], 5, 2, [2])[0], full[2])
    others = [divergence.rademacher(x, 6, 2), divergence.rademacher(x, 5, 3), full.roll(1, 0)]
    for other in others:  # 768 signs: 5 standard errors
        assert abs(float((full * other).sum())) < 5 * 768**0.5
    assert abs(float(full.sum())) < 5 * 768**0.5


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda x: divergence.directional_derivative(torch.sin, x, x, "backward"), ["method", "'backward'", "forward"]),
        (lambda x: divergence.directional_derivative(torch.sin, x, x[:1], "forward"), ["v has shape (1, 8)", "(2, 8)"]),
    ],
    ids=["method", "shape"],
)
def test_errors_name_what_is_wrong(build, words):
    with pytest.raises(ValueError) as error:
        build(torch.ones(2, 8))
    assert all(word in str(error.value) for word in words)


# --- which method ------------------------------------------------------------------------------------------------


class _NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()


def _detached(x):
    """Drops half of the tangent, as a kernel of its own does that torch does not know."""
    return 0.5 * x.sin() + 0.5 * torch.autograd.forward_ad.unpack_dual(x).primal.sin()


@pytest.mark.parametrize(
    "network, method, words",
    [
        (torch.sin, "forward", ["forward-mode AD", "0.0"]),
        (_NoForward.apply, "differences", ["failed"]),
        (_detached, "differences", ["differs", "%"]),
        (lambda x: x.detach() * 0 + 3.0, "forward", ["0.00%"]),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), "forward", ["0.0"]),
    ],
    ids=["smooth", "refused", "wrong", "constant", "attention"],
)
def test_the_method_is_found_out(network, method, words):
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found, reason = divergence.method_of(network, x, divergence.rademacher(x, 0, 0))
    assert found == method
    assert all(word in reason for word in words)


def test_lack_of_memory_passes_through_the_trial():
    """Another time there may be enough: it is no property of the network."""

    def network(x):
        if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise torch.OutOfMemoryError("out of memory")
        return x

    with pytest.raises(torch.OutOfMemoryError):
        divergence.method_of(network, torch.ones(1, 4), torch.ones(1, 4))


def test_the_trial_takes_the_calls_that_are_told():
    """Differences ask for two batches at once, which a host splits."""
    rows = []
    divergence.method_of(lambda x: rows.append(len(x)) or x.sin(), torch.ones(1, 4), torch.ones(1, 4))
    assert sum(rows) == divergence.TRIAL_CALLS


def test_interrupts_pass_through_the_trial():
    class Interrupt(Exception):
        pass

    def stop(x):
        raise Interrupt

    with pytest.raises(Interrupt):
        divergence.method_of(stop, torch.ones(1, 4), torch.ones(1, 4))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 0.01), (torch.bfloat16, 0.35), (torch.float16, 0.1)], ids=str)
@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_methods_agree_on_a_real_network(dtype, bound, sigma):
    """Derivatives inside the host's inference mode, with weights that are inference tensors; norm and trace."""
    found = {}

    def work(model):
        x = model.x * (1 + sigma**2) ** 0.5
        v = divergence.rademacher(x, 1, 0)
        for method in divergence.METHODS:
            step = divergence.difference_step(x, v, dtype, sigma)
            predict = lambda x: model.predict(x, sigma)
            value, slope = divergence.directional_derivative(predict, x, v, method, step)
            found[method] = slope - v if sigma < 5 else slope  # what the network adds to the identity

    run_on_unet(work, dtype)
    assert all(s.isfinite().all() for s in found.values())
    difference = (found["forward"] - found["differences"]).norm() / found["differences"].norm()
    assert 0 < float(difference) < bound


def run_on_unet(work, dtype):
    guider = h.outputs(h.custom.BasicGuider, networks.unet(dtype), networks.unet_conditioning())[0]
    latent = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return model_access.run_in_guider(guider, latent, work, 4, [1.0])

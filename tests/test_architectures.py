"""Every model family of the host, with its real classes: see tiny_models.py and benchmarks/architectures.py."""

import pytest
import torch
from density_guidance.benchmarks import architectures
from density_guidance.testing import host_runs as h
from density_guidance.testing import tiny_models
from density_guidance.testing.applied import APPLIED, STEERING

ACCEPTED = [name for name in tiny_models.FAMILIES if name not in tiny_models.REFUSED]
SLOW = ("sd2", "ace_step")  # in bf16 on a CPU
# One weight type and one node for each family, so that each of them meets images, video and audio; what moves the starting
# noise with one latent of each shape. The benchmark runs every family with every node in both types: docs/architectures.md.
RUNS = [(name, "fp32" if name in SLOW else ("fp32", "bf16")[i % 2], STEERING[i // 2 % 2]) for i, name in enumerate(ACCEPTED)]
RUNS += [
    ("sd3", "fp32", "PriorGuidanceScale"),
    ("flux", "bf16", "PriorGuidanceModel"),
    ("wan21", "bf16", "PriorGuidanceScale"),
    ("hunyuan3d", "fp32", "PriorGuidanceModel"),
]


pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.mark.parametrize("name, dtype, node", RUNS, ids=str)
def test_every_family(name, dtype, node):
    """Neutral to the bit, no further model call, and the change that the definition asks for: measured in float64."""
    assert torch.isfinite(architectures.plain(name, dtype)[1]).all()
    result = architectures.measure(name, dtype, node)
    assert result["neutral"] and result["finite"] and result["calls"] == 0, result
    assert result["error"] < 1e-4, result
    if "eta" in result:  # more detail: less of the noise is taken away
        assert all(0 < eta < 1 for eta in result["eta"]), result


def test_every_node_and_weight_type_is_among_them():
    assert {(dtype, node) for _, dtype, node in RUNS} == {(dtype, node) for dtype in architectures.DTYPES for node in APPLIED}


@pytest.mark.parametrize(
    "name, dtype",
    [("pixart", "fp32"), ("wan21", "bf16"), ("stable_audio", "fp32")],
    ids=["image, eps", "video, flow", "audio, v"],
)
def test_nodes_that_vary_trace_read_target_and_check(name, dtype):
    results = architectures.read(name, dtype)
    assert all(result["finite"] and result.get("neutral", True) for result in results.values()), results


@pytest.mark.parametrize("name", ACCEPTED[::4])
def test_own_solver(name):
    """Without a sampler connected: finite, one call per step, and different from the unguided solver."""
    run, _, _ = architectures.plain(name, "fp32")
    images = {}
    for quantile in (0.5, 0.2):
        images[quantile], seen = architectures.sampled(name, run._replace(sampler=h.guided_sampler(quantile)))
        assert torch.isfinite(images[quantile]).all() and len(seen.x) == architectures.STEPS
    assert not torch.equal(images[0.5], images[0.2])


@pytest.mark.parametrize("name", tiny_models.REFUSED)
@pytest.mark.parametrize("node", STEERING)
def test_models_without_a_noise_path_are_refused_by_name(name, node):
    message, calls = architectures.refusal(name, node)
    assert tiny_models.REFUSED[name] in message and "no Gaussian noise path" in message and calls == 0


def test_tiny_models_are_the_same_every_time():
    first, second = (tiny_models.build("flux").model.diffusion_model.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first) and len(first) > 20

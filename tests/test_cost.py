"""What guidance costs: memory and synchronisation per step, against the host's own Euler; benchmarks/cost.py has the time."""

import pytest
import torch
from density_guidance.benchmarks import cost
from density_guidance.testing import host_runs as h
from torch.profiler import ProfilerActivity, profile

SHAPES = pytest.mark.parametrize("shape", [(1, 4, 128, 128), (4, 16, 128, 128)], ids=["1x4x128x128", "4x16x128x128"])
MODELS = pytest.mark.parametrize("model_type", ["EPS", "FLOW"])


def prepared(model_type, shape, steps, sampler):
    """A run of the host, ready to call, with a network that returns its input."""
    model = h.free_model(model_type)
    schedule = h.schedule(model, steps)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return lambda: h.free_run(model, sampler, schedule, noise)


def ways():
    return {
        "plain": h.core_sampler("euler"),
        "guided": h.guided_sampler(0.3, 0.1, sampler="euler"),
        "own": h.guided_sampler(0.3, 0.1),
        "masked": h.guided_sampler(0.3, 0.1, sampler="euler", mask=torch.ones(1, 8, 8), curve=[1.0, 2.0]),
    }


def synchronisations(model_type, shape, steps, sampler):
    """How often the run waits for the device to hand over a number."""
    run = prepared(model_type, shape, steps, sampler)
    run()
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        run()
    return sum(e.name() == "aten::_local_scalar_dense" for e in prof.profiler.kineto_results.events())


def test_the_count_of_synchronisations_sees_them():
    class Reading(h.comfy.samplers.Sampler):
        def sample(self, guider, sigmas, extra_args, callback, noise, *args):
            for sigma in sigmas:
                float(sigma)
            return noise

    assert synchronisations("EPS", (1, 4, 8, 8), 5, Reading()) >= 6


@SHAPES
@MODELS
def test_no_synchronisation_inside_a_step(model_type, shape):
    """What guidance reads from the device does not grow with the steps; the own solver reads no more than Euler."""
    few, many = ({name: synchronisations(model_type, shape, steps, s) for name, s in ways().items()} for steps in (4, 12))
    for name in ("guided", "masked"):
        assert many[name] - many["plain"] == few[name] - few["plain"]
    assert many["own"] - few["own"] <= many["plain"] - few["plain"]


def allocations(model_type, shape, steps, sampler):
    """How often the run asks the allocator for as much as a latent takes, or more."""
    run = prepared(model_type, shape, steps, sampler)
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    size = 4 * torch.Size(shape).numel()
    return sum(e.name() == "[memory]" and e.nbytes() >= size for e in prof.profiler.kineto_results.events())


@SHAPES
@MODELS
def test_at_most_two_more_temporaries_per_step(model_type, shape):
    per_step = {}
    for name, sampler in list(ways().items())[:2]:
        few, many = (allocations(model_type, shape, steps, sampler) for steps in (4, 12))
        per_step[name] = (many - few) / 8
    print(f"{model_type} {shape}: temporaries per step {per_step}")
    assert per_step["plain"] > 2  # the count sees the run
    assert per_step["guided"] - per_step["plain"] <= 2


STAND_IN = """
class DetailDaemonSamplerNode:
    def go(self, sampler, *, detail_amount, start, end, bias, exponent, start_offset, end_offset, fade, smooth,
           cfg_scale_override):
        return (sampler,)
"""


def test_the_benchmark_of_time_compares_every_way(tmp_path):
    (tmp_path / "__init__.py").write_text("from .detail_daemon_node import DetailDaemonSamplerNode\n")
    (tmp_path / "detail_daemon_node.py").write_text(STAND_IN)
    found = cost.ratios("EPS", (1, 4, 8, 8), repeats=2, steps=2, daemon=cost.detail_daemon(tmp_path))
    assert list(found) == [cost.AGAIN, cost.GUIDED, cost.DAEMON, cost.SCALING]
    assert all(0 < e["low"] <= e["median"] <= e["high"] for e in found.values())


def test_a_folder_without_detail_daemon_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="DETAIL_DAEMON is .*detail_daemon_node.py"):
        cost.detail_daemon(tmp_path)

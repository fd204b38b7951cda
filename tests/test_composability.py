"""The host's own guidance methods, guiders, caches and conditionings with the pack: see benchmarks/composability.py."""

import pytest
from density_guidance.benchmarks import composability
from density_guidance.testing.applied import STEERING
from density_guidance.testing.host_methods import COMPILED

# torch.compile takes a C++ compiler and half a minute: it is in docs/composability.md.
METHODS = [(name, STEERING[i % 2]) for i, name in enumerate(composability.METHODS) if name != COMPILED]


def holds(name, result, node):
    """The method is guided as a whole."""
    assert result["neutral"] and result["finite"] and result["same_method"], (node, result)
    assert result["same_calls"] or composability.METHODS[name].own_state, (node, result)
    assert result["error"] < 1e-4, (node, result)


@pytest.mark.parametrize("name, node", METHODS)
def test_guidance_acts_on_the_final_prediction(name, node):
    """Neutral to the bit, the method's own prediction guided as a whole, no further model call.

    Each method meets either the patch of the model, in both orders, or the wrapped sampler and the own solver; it meets all
    of them in docs/composability.md.
    """
    assert composability.acts(name)
    holds(name, composability.measure(name, node), node)
    # where the sampler is not euler, the method is a sampler
    if node == "DensityGuidanceSampler" and composability.METHODS[name].sampler == "euler":
        holds(name, composability.measure_own(name), composability.OWN)


def test_caches_do_reuse_predictions():
    """Otherwise the two would be tested in name only."""
    calls = {name: composability.plain(name)[1].calls for name in ("Context windows", "LazyCache")}
    assert calls["LazyCache"] < composability.STEPS < calls["Context windows"]


def test_two_stages_equal_one_run():
    assert composability.two_stages() < 2e-6

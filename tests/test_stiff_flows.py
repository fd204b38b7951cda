"""The pack's own solver where a high CFG, few steps or strong noise make the flow stiff."""

from functools import lru_cache

import pytest
import torch
from density_guidance.dg_core import variation
from density_guidance.testing import host_runs as h

# prediction, scheduler and steps at which high orders are unstable, but the host's first-order samplers are not
STIFF = pytest.mark.parametrize(
    "prediction, scheduler, steps",
    [("eps", "karras", 16), ("eps", "exponential", 8), ("flow", "simple", 12)],
    ids=lambda v: str(v),
)
COMPONENT = 3


def run(prediction, scheduler, steps, cfg, sampler, images=1):
    model = h.exact_model(prediction, 32)
    return h.sampled(
        model,
        sampler,
        h.schedule(model, steps, scheduler),
        h.empty_latent(images, 32),
        cfg=cfg,
        positive=h.conditioning(prediction, COMPONENT),
        negative=h.conditioning(prediction),
    )


@lru_cache
def reach(prediction, scheduler, steps, sampler=None):
    """The largest element of 6 images, without its sign, at CFG 8. sampler: of the host, or None for the own solver."""
    return reach_of(prediction, scheduler, steps, h.guided_sampler(sampler=sampler))


def reach_of(prediction, scheduler, steps, sampler):
    return float(run(prediction, scheduler, steps, 8.0, sampler, images=6).abs().max())


IN_RANGE = 1.5  # of another run's reach: images differ in it by less, and one out of range is many times off


@STIFF
@pytest.mark.parametrize("quantile, cfg", [(0.5, 8.0), (0.2, 3.0)])
def test_error_is_no_larger_than_that_of_euler(prediction, scheduler, steps, quantile, cfg):
    converged = run(prediction, scheduler, 60, cfg, h.guided_sampler(quantile))
    own, euler = (run(prediction, scheduler, steps, cfg, h.guided_sampler(quantile, sampler=s)) for s in (None, "euler"))
    error, error_euler = (float((x - converged).square().mean().sqrt()) for x in (own, euler))
    print(f"{error:.1e}, Euler {error_euler:.1e}")
    assert error < error_euler


@pytest.mark.parametrize(
    "prediction, scheduler, steps, correction, strength",
    [
        ("eps", "karras", 16, "exact", 3.0),
        ("eps", "exponential", 10, "hutchinson", 3.0),
        ("flow", "simple", 12, "exact", 3.0),
        ("flow", "simple", 12, "expected", 0.5),
        ("eps", "exponential", 12, "hutchinson", 2.0),
        ("eps", "karras", 6, "expected", 3.0),
        ("eps", "karras", 6, "exact", 2.0),
        ("eps", "exponential", 8, "expected", 1.0),
        ("eps", "exponential", 8, "hutchinson", 3.0),
    ],
)
def test_variations_stay_in_range(prediction, scheduler, steps, correction, strength):
    """Of docs/variation.md, which has every pair with 48 images: each correction at its strongest, and where steps are few."""
    noisy = reach_of(prediction, scheduler, steps, h.varied("everything", strength, correction))
    assert noisy < IN_RANGE * reach(prediction, scheduler, steps)


@pytest.mark.parametrize(
    "vary, correction", [("everything", "expected"), ("fine details", "hutchinson"), ("everything", "exact")]
)
def test_variations_go_no_further_where_even_euler_leaves_the_range(vary, correction):
    """Strengths to 1, the most noise that the host's own samplers add."""
    converged = reach("flow", "simple", 40, sampler="euler")
    plain, euler = reach("flow", "exponential", 12), reach("flow", "exponential", 12, sampler="euler")
    variations = [reach_of("flow", "exponential", 12, h.varied(vary, strength, correction)) for strength in (0.5, 1.0)]
    print(f"converged {converged:.3g}; own solver {plain:.3g}, Euler {euler:.3g}, variations {variations}")
    assert min(plain, euler) > 5 * converged
    assert max(variations) < IN_RANGE * max(plain, euler)


@pytest.mark.parametrize("prediction, correction", [("eps", "expected"), ("flow", "hutchinson"), ("eps", "exact")])
def test_the_bound_of_the_step_is_for_stiff_flows_only(prediction, correction, monkeypatch):
    def image(share):
        monkeypatch.setattr(variation, "_LARGEST_SHARE", share)
        return run(prediction, "simple", 20, 8.0, h.varied("everything", 3.0, correction))

    unbounded = image(1e9)
    assert torch.equal(image(0.1), unbounded)
    assert not torch.equal(image(0.001), unbounded)


def test_strong_noise_in_many_pieces_stays_in_range():
    plain, noisy = (
        run("eps", "karras", 10, 1.0, sampler)
        for sampler in (h.guided_sampler(), h.varied("everything", 3.0, "exact", probes=16))
    )
    assert float(noisy.abs().max()) < IN_RANGE * float(plain.abs().max())


def test_an_image_alone_chooses_its_order():
    """An image of the batch in trouble changes nothing for the others."""
    model = h.exact_model("eps")
    sigmas = h.schedule(model, 8, "exponential")
    settings = {"positive": h.conditioning("eps", COMPONENT), "negative": h.conditioning("eps"), "cfg": 8.0}
    images = h.sampled(model, h.guided_sampler(), sigmas, h.empty_latent(3), **settings)
    alone = h.sampled(model, h.guided_sampler(), sigmas, {**h.empty_latent(1), "batch_index": [2]}, **settings)
    assert torch.allclose(alone[0], images[2], atol=1e-4)

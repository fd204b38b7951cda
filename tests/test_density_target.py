"""Explicit control in the real host: the exact log-density of what comes out, against what was asked for."""

import json
import logging
import math

import pytest
import torch
from density_guidance.dg_core.target import Run, first_aim, reach
from density_guidance.nodes import DensityTrace, LogDensity
from density_guidance.nodes.host import target_run as dt
from density_guidance.testing import host_runs as h
from density_guidance.testing.measures import cut_schedule, exact_bits, exact_divergence, target_sampler

LN2 = math.log(2)
LARGER = 32  # pixels, where log-densities are compared in nats per dimension


def run(model, sampler, batch, seed=h.SEED):
    """(exact bits per dimension with `sampler`, and without guidance)."""
    sigmas, latent = cut_schedule(model), h.empty_latent(batch, model.model.density.size)
    found, plain = (exact_bits(model, h.sampled(model, s, sigmas, latent, seed), sigmas) for s in (sampler, h.guided_sampler()))
    return found, plain


def guided(model, sampler, sigmas, noise):
    """A run from noise given as a tensor."""
    guider = h.outputs(h.custom.BasicGuider, model, h.conditioning())[0]
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=h.SEED)


@pytest.mark.parametrize("prediction, shift", [("flow", 0.3), ("flow", -0.3), ("eps", 0.3)])
def test_exact_divergence_meets_the_target(prediction, shift):
    model = h.exact_model(prediction)
    found, plain = run(model, exact_divergence(target_sampler(value=shift, tolerance=3e-4), model), 8)
    error = (found - plain - shift).abs() * LN2
    assert 0 < float(error.quantile(0.9)) < 1.2e-3


@pytest.mark.parametrize("target, value", [(dt.SHIFT, 0.3), (dt.ABSOLUTE, 1.0)])
def test_one_probe_meets_the_target(target, value):
    model = h.exact_model("flow", LARGER)
    found, plain = run(model, target_sampler(target, value), 6)
    wanted = value if target == dt.ABSOLUTE else plain + value
    assert 0 < float(((found - wanted).abs() * LN2).quantile(0.9)) < 3e-3


def test_decoded_equals_encoded():
    """What was tracked while sampling, and the readout of the result, agree within their error bars."""
    model = h.exact_model("flow")
    sigmas = cut_schedule(model)
    guider = h.outputs(h.custom.BasicGuider, model, h.conditioning())[0]
    output, _, _, record = h.outputs(
        DensityTrace, h.random_noise(), guider, target_sampler(value=0.2), sigmas, h.empty_latent(8), False
    )
    told = json.loads(record)["target"]
    bits, report, _ = h.outputs(LogDensity, guider, output, 32, 1, 5, told["s"])
    stated = torch.tensor([float(line.split("±")[1].split()[0]) for line in report.splitlines()[:8]])
    bars = (torch.tensor(told["standard_error"]).square() + stated.square()).sqrt()
    z = (torch.tensor(bits) - torch.tensor(told["achieved"])) / bars
    assert float(z.abs().max()) < 3.5 and 0.3 < float(z.square().mean().sqrt()) < 1.8


@pytest.mark.parametrize("divergence", ["one probe", "exact"])
def test_a_batch_becomes_alike(divergence):
    model, sampler = h.exact_model("flow", LARGER), target_sampler(dt.SAME, tolerance=5e-4)
    found, plain = run(model, sampler if divergence == "one probe" else exact_divergence(sampler, model), 16)
    assert float(found.std()) < 0.1 * float(plain.std())
    assert float(plain.min()) < float(found.mean()) < float(plain.max())


def test_the_reference_image_sets_the_value():
    model = h.exact_model("flow")
    found, plain = run(model, exact_divergence(target_sampler(dt.SAME, reference_image=3), model), 4)
    assert (found - plain[3]).abs().max() * LN2 < 3e-3
    assert (plain - plain[3]).abs().max() * LN2 > 6e-3


def test_shift_zero_is_the_own_solver():
    model = h.exact_model("flow")
    sigmas = h.schedule(model, 6)
    model, seen = h.recording(model)
    assert torch.equal(h.sampled(model, target_sampler(), sigmas), h.sampled(model, h.guided_sampler(), sigmas))
    assert seen.calls == 12


def test_images_do_not_depend_on_the_batch():
    model = h.exact_model("flow")
    sigmas = h.schedule(model, 8)
    sampler = target_sampler(value=0.2)
    noise = torch.randn(3, 3, h.SIZE, h.SIZE, generator=torch.Generator().manual_seed(1))
    together = guided(model, sampler, sigmas, noise)
    alone = guided(model, sampler, sigmas, noise[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_reached_is_said(caplog):
    model = h.exact_model("flow")
    with caplog.at_level(logging.WARNING):
        h.sampled(model, target_sampler(value=-2.0, max_passes=1), h.schedule(model, 8), h.empty_latent(1))
    assert "not reached" in caplog.text and "nearest" in caplog.text and "target" in caplog.text


def test_the_last_step_to_zero_is_taken():
    """The image is that of the same run cut before, denoised."""
    model = h.exact_model("eps")
    sampler = exact_divergence(target_sampler(value=0.2), model)
    full = h.schedule(model, 17)
    state = h.sampled(model, sampler, full[:-1])
    no_noise = h.outputs(h.custom.DisableNoise)[0]
    denoised = h.sampled(model, "euler", torch.stack([full[-2], full[-1]]), {"samples": state}, noise=no_noise)
    found = h.sampled(model, sampler, full)
    assert float((found - denoised).norm() / denoised.norm()) < 2e-3


@pytest.mark.parametrize(
    "change, words",
    [
        ({"target": "more"}, ["target", "'more'"]),
        ({"value": math.nan}, ["value"]),
        ({"probes": 1.5}, ["probes is 1.5", "whole"]),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_settings_are_refused(change, words):
    with pytest.raises(ValueError) as error:
        target_sampler(**change)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "sampler, sigmas, latent, words",
    [
        ({"target": dt.SAME, "reference_image": 5}, None, {}, ["reference_image is 5", "2 images"]),
        ({"value": 0.1}, [1.0, 0.0], {}, ["no step"]),
        ({"value": 0.1}, None, {"noise_mask": torch.ones(1, 1, 32, 32)}, ["noise mask"]),
    ],
    ids=["image", "schedule", "mask"],
)
def test_bad_runs_are_refused_before_any_call(sampler, sigmas, latent, words):
    model, seen = h.recording(h.exact_model("flow"))
    sigmas = h.schedule(model, 4) if sigmas is None else torch.tensor(sigmas)
    with pytest.raises(ValueError) as error:
        h.sample(model, target_sampler(**sampler), sigmas, {**h.empty_latent(), **latent})
    assert all(word in str(error.value) for word in words)
    assert seen.calls == 0


def test_repeated_and_rising_noise_levels_change_nothing():
    model = h.exact_model("flow")
    plain = h.schedule(model, 8)
    sigmas = torch.cat([plain[:3], plain[2:3], plain[2:3] * (1 + 1e-7), plain[3:]])
    sampler = exact_divergence(target_sampler(value=0.2), model)
    assert torch.equal(*(h.sampled(model, sampler, s, h.empty_latent(2)) for s in (sigmas, plain)))


def test_packed_parts_are_refused(monkeypatch):
    model, seen = h.recording(h.exact_model("flow"))
    extra = type(model.model).extra_conds
    monkeypatch.setattr(
        type(model.model), "extra_conds", lambda self, **kwargs: {**extra(self, **kwargs), "latent_shapes": None}
    )
    with pytest.raises(ValueError, match="combines video and audio"):
        h.sampled(model, target_sampler(value=0.2), h.schedule(model, 4))
    assert seen.calls == 0


class _Passes:
    """Runs whose ends are given, (B,) each, with the number of the pass as image."""

    dim = 1

    def __init__(self, *ends):
        self._ends, self._count = ends, 0

    def run(self, aim=None):
        end = torch.tensor(self._ends[self._count], dtype=torch.float64)
        self._count += 1
        return _Run(torch.full((len(end), 1), self._count - 1.0), {1.0: 0 * end}, {1.0: end}, end, 0 * end, None, None)

    def read(self, run):
        """As tracked."""
        return run.end, 0 * run.end


class _Run(Run):
    """Of one step."""

    def room(self, steps=None):
        return {1.0: torch.ones_like(self.end)}


def test_the_first_pass_goes_towards_the_target():
    reference = _Passes([0.0, 0.0]).run()
    assert first_aim(reference, torch.tensor([0.4, -0.4]).double()).eta[1.0].tolist() == pytest.approx([0.1, -0.1])


def test_an_image_within_tolerance_is_left_alone():
    """Whether its neighbour needs another pass must not change it, though the pass may come nearer."""
    reached = reach(_Passes([0.0, 0.0], [0.9, 3.0], [1.0, 1.05]), lambda unguided: torch.ones_like(unguided), 0.2, 2)
    assert reached.x.flatten().tolist() == [1, 2] and reached.achieved.tolist() == [0.9, 1.05]
    assert reached.passes == 2


@pytest.mark.parametrize("prediction, scheduler", [("eps", "karras"), ("flow", "simple")])
def test_textures_that_amplify_meet_the_target(prediction, scheduler):
    """Their contrast is open at high noise: what control adds changes the image by 3 to 6 times as much."""
    model = h.texture_model(prediction)
    sigmas, latent = h.schedule(model, 20, scheduler)[:-1], h.empty_latent(3, h.TEXTURE_SIZE)
    positive = h.texture_conditioning(prediction, 2)

    def bits(sampler):
        return exact_bits(model, h.sampled(model, sampler, sigmas, latent, positive=positive), sigmas)

    plain = bits(h.guided_sampler())
    for shift in (-0.4, 0.4):
        missed = bits(target_sampler(value=shift, probes=2)) - plain - shift
        assert 0 < float(missed.abs().max()) < 0.02

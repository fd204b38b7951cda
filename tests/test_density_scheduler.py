"""Density Scheduler: its row of noise levels, and the amounts that runs with it meet."""

import logging
import math

import comfy.samplers
import numpy as np
import pytest
import torch
from density_guidance.dg_core.control import Control, gain_of, guided_steps
from density_guidance.dg_core.levels import clock
from density_guidance.dg_core.schedule import FLOW, Schedule
from density_guidance.dg_core.solver import solve
from density_guidance.nodes import DensityScheduler
from density_guidance.nodes.builtin import exact
from density_guidance.nodes.host.noise_path import path_of
from density_guidance.testing import host_runs as h
from density_guidance.testing import networks

TEXTURES, SIZE = "textures", 32


def sigmas_of(model, steps=20, denoise=1.0, latent=None):
    return h.outputs(DensityScheduler, model, steps, denoise, latent)[0]


def levels_of(model, sigmas):
    path = path_of(model.get_model_object("model_sampling"))
    return [path.s(v) for v in sigmas.double().tolist()]


@pytest.mark.parametrize("prediction", exact.PREDICTIONS)
def test_levels_are_even_on_the_clock(prediction):
    model = exact.load(prediction, SIZE, TEXTURES)[0]
    sigmas = sigmas_of(model, latent={"samples": torch.zeros(2, 3, SIZE, SIZE)})
    sampling = model.get_model_object("model_sampling")
    assert len(sigmas) == 21 and sigmas[-1] == 0 and sigmas[0] == sampling.sigma_max and sigmas[-2] >= sampling.sigma_min
    ticks = [clock(s, 3 * SIZE**2) for s in levels_of(model, sigmas)[:-1]]
    gaps = [a - b for a, b in zip(ticks, ticks[1:])]
    assert gaps == pytest.approx([gaps[0]] * 19, rel=0.01)  # sigmas are float32


def test_denoise_keeps_the_end_of_a_longer_row():
    model = exact.load("flow", SIZE, TEXTURES)[0]
    assert torch.equal(sigmas_of(model, 10, 0.5), sigmas_of(model, 20)[-11:])


def test_it_ends_where_images_hold_nothing_to_see():
    model = networks.dit(torch.float32)
    assert levels_of(model, sigmas_of(model))[-2] == pytest.approx(0.03, rel=1e-3)


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"steps": 1}, ["steps", "1", "2"]),
        ({"denoise": 0.0}, ["denoise", "0.0", "0.01"]),
        ({"model": None}, ["model", "NoneType", "MODEL"]),
        ({"latent": {"samples": None}}, ["latent_image", "LATENT"]),
    ],
)
def test_bad_inputs_are_named(inputs, words):
    model = inputs.pop("model", h.exact_model("flow"))
    h.fails(words, sigmas_of, model, **inputs)


def refined(levels, parts=6):
    """Every step in parts, and a step from infinity in many."""
    finite = [s for s in levels if math.isfinite(s)]
    inner = [a * (b / a) ** (k / parts) for a, b in zip(finite, finite[1:]) for k in range(parts)]
    above = [math.inf, *np.geomspace(2e4, finite[0], 24)[:-1]] if math.isinf(levels[0]) else []
    return [*above, *inner, finite[-1]]


def bits(density, levels, quantile, high):
    """Exact bits per dimension of four images at the last level, guided from the noise level `high` on."""
    schedule = Schedule(FLOW, [FLOW.sigma(s) for s in levels])
    steps = guided_steps(schedule, FLOW.sigma(high) * (1 + 1e-9))
    control = Control(steps, gain_of(quantile, 0.0, density.dim, steps.log_range)[0])
    noise = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7)).double()

    def denoised(x, sigma):
        alpha = FLOW.alpha(sigma)
        return density.denoised(x / alpha, sigma / alpha) if alpha > 0 else density.denoised(0 * x, 1e5)

    last = schedule.levels[-1]
    return density.bits_per_dim(solve(denoised, noise, schedule, control) / last.alpha, last.s)


def test_guided_amounts_are_met_in_20_steps():
    """On the density that amplifies, against the same schedule with six steps in place of each; and "simple" misses them."""
    model = exact.load("flow", SIZE, TEXTURES)[0]
    sampling, density = model.get_model_object("model_sampling"), model.model.density
    latent = {"samples": torch.zeros(1, 3, SIZE, SIZE)}
    worst = {}
    for name, sigmas in (
        ("ours", sigmas_of(model, latent=latent)),
        ("simple", comfy.samplers.calculate_sigmas(sampling, "simple", 20)),
    ):
        levels = levels_of(model, sigmas)[:-1]
        missed = [bits(density, levels, q, levels[1]) - bits(density, refined(levels), q, levels[1]) for q in (0.1, 0.3, 0.7)]
        worst[name] = float(torch.cat(missed).abs().max())
    assert worst["ours"] < 0.02 < 0.1 < worst["simple"]


@pytest.mark.parametrize("scheduler, warned", [("simple", True), ("ours", False)])
def test_a_schedule_with_long_steps_is_named(caplog, scheduler, warned):
    model = h.texture_model("flow")
    latent = h.empty_latent(1, h.TEXTURE_SIZE)
    sigmas = sigmas_of(model, 12, latent=latent) if scheduler == "ours" else h.schedule(model, 12, scheduler)
    with caplog.at_level(logging.WARNING):
        h.sampled(model, h.guided_sampler(0.3), sigmas, latent, positive=h.texture_conditioning("flow"))
    assert ("Density Scheduler" in caplog.text) == warned

"""The noise path of a model, by what its sampling does; samplings of newer hosts are imitated where this one lacks them."""

import math

import comfy.model_sampling as host
import pytest
import torch
from comfy.model_base import ModelType
from density_guidance.dg_core.schedule import FLOW, VE, NoisePath
from density_guidance.nodes import LogDensity
from density_guidance.nodes.host.noise_path import path_of
from density_guidance.testing import host_runs as h


class RawVelocity(host.EPS):
    """CogVideoX: the network takes the latent as it is, and its output is a velocity."""

    def calculate_input(self, sigma, noise):
        return noise

    def calculate_denoised(self, sigma, model_output, model_input):
        sigma = host.reshape_sigma(sigma, model_output.ndim)
        return (model_input - model_output * sigma) / (sigma**2 + 1) ** 0.5


class ScaledNoise(host.CONST):
    """HiDream-O1: what a flow of ComfyUI 0.33 does with a noise_scale of 8."""

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return sigma * (8.0 * noise) + (1.0 - sigma) * latent_image


class OutputOfFlow(host.CONST):
    """A flow whose network gives the image."""

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_output


class BridgeOfFlow(host.CONST):
    """Marigold v2: starts from the image, and its one step takes the velocity whole."""

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - model_output

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return latent_image


class WholeStep(host.CONST):
    """A part of it, which refuses it alone."""

    calculate_denoised = BridgeOfFlow.calculate_denoised


class Trigonometric(host.CONST):
    """A path of Gaussian noise, but not one that samplers follow."""

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return torch.sin(sigma) * noise + torch.cos(sigma) * latent_image


class MixesTwice(host.EPS):
    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return super().noise_scaling(sigma, noise, latent_image + noise.abs())


def sampling(kind, base=host.ModelSamplingDiscreteFlow):
    return type("ModelSampling", (base, kind), {})()


ACCEPTED = {
    "EPS": VE,
    "V_PREDICTION": VE,
    "V_PREDICTION_EDM": VE,
    "V_PREDICTION_CONTINUOUS": VE,
    "EDM": VE,
    "STABLE_CASCADE": VE,
    "FLOW": FLOW,
    "FLUX": FLOW,
    "FLOW_COSMOS": VE,
    "V_PREDICTION_DDPM": VE,
}


@pytest.mark.parametrize("kind", [kind for kind in ACCEPTED if kind in ModelType.__members__])
def test_model_types_of_the_host(kind):
    assert path_of(h.free_model(kind).get_model_object("model_sampling")) == ACCEPTED[kind]


@pytest.mark.parametrize("node", ["eps", "v_prediction", "lcm", "x0"])
def test_model_samplings_that_a_node_sets(node):
    model = h.core_node("ModelSamplingDiscrete", model=h.free_model("EPS"), sampling=node, zsnr=False)
    assert path_of(model.get_model_object("model_sampling")) == VE


@pytest.mark.parametrize("kind, path", [(RawVelocity, VE), (OutputOfFlow, FLOW), (ScaledNoise, NoisePath("flow", 8.0))])
def test_a_sampling_is_taken_whatever_its_name(kind, path):
    assert path_of(sampling(kind)) == path


@pytest.mark.skipif(not hasattr(host.ModelSamplingDiscreteFlow, "set_noise_scale"), reason="this host has no noise_scale")
def test_noise_scale_of_the_host():
    model = h.core_node("ModelNoiseScale", model=h.free_model("FLOW"), noise_scale=7.5)
    assert path_of(model.get_model_object("model_sampling")) == NoisePath("flow", 7.5)


def test_a_sampling_that_computes_in_float32_has_noise_of_exactly_1():
    class Short(host.CONST):
        def noise_scaling(self, sigma, noise, *rest):
            return super().noise_scaling(sigma.float(), noise.float() * (1 + 2**-23), *rest)

    assert path_of(sampling(Short)) == FLOW


@pytest.mark.parametrize(
    "kind, words",
    [
        (host.IMG_TO_IMG, ["IMG_TO_IMG", "any noise alike"]),
        (BridgeOfFlow, ["BridgeOfFlow", "1 * image + 0 * noise"]),
        (WholeStep, ["WholeStep", "1 * latent + -1 * the network's output"]),
        (Trigonometric, ["Trigonometric", "0.878 * image + 0.479 * noise"]),
        (MixesTwice, ["MixesTwice", "nan * image"]),
        *((getattr(host, name), [name]) for name in ("IMG_TO_IMG_FLOW", "IMG_TO_IMG_VELOCITY") if hasattr(host, name)),
    ],
)
def test_a_sampling_without_a_path_is_refused(kind, words):
    h.fails([*words, "no Gaussian noise path", "image + sigma * noise"], path_of, sampling(kind))


# --- noise that weighs more -------------------------------------------------------------------------------------------


def scaled_model(function):
    model = h.free_model("FLOW", function)
    model.add_object_patch("model_sampling", sampling(ScaledNoise))
    return model


@pytest.mark.parametrize("way", ["sampler", "patch"])
def test_eta_counts_the_noise_by_its_scale(way):
    """eta - 1 = k / ||eps||^2 with eps = (x - alpha denoised) / (8 sigma), where a plain flow would find 1/64 of it."""
    model, seen = h.recording(scaled_model(h.towards_a_pattern))
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    sampler = h.core_sampler("euler")
    if way == "patch":
        model = h.guided_model(model, 0.5, 0.1)
    else:
        sampler = h.guided_sampler(0.5, 0.1, sampler="euler")
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    h.free_run(model, sampler, sigmas, noise)
    s = [NoisePath("flow", 8.0).s(v) for v in (0.8, 0.2)]
    gain = -0.1 * 64 * math.log(2) / math.log(s[0] / s[1])
    x, plain, guided = (values[1].double() for values in (seen.x, seen.denoised, seen.final))
    eps = (x - 0.2 * plain) / (8 * 0.8)
    eta = gain / eps.square().flatten(1).sum(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(guided - plain, -eta * s[0] * eps, rtol=1e-4, atol=1e-6)


def test_bits_are_those_of_the_noise_that_is_there():
    """Images of independent N(0, 1) elements, read at s = 0.05: the density of N(0, 1 + s^2)."""

    def normal(x, t):
        sigma = t.view(-1, 1, 1, 1) / 1000
        alpha, std = 1 - sigma, 8 * sigma
        return (x - x * alpha / (alpha**2 + std**2)) / sigma.clamp(min=1e-6)

    model = scaled_model(normal)
    images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    guider = h.outputs(h.custom.BasicGuider, model, [[torch.zeros(1, 1, 1), {}]])[0]
    with h.without_plots():
        found = h.outputs(LogDensity, guider, {"samples": images}, 32, 1, 0, 0.05)[0]
    variance = 1 + 0.05**2
    nats = 0.5 * (images.double().square() / variance + math.log(2 * math.pi * variance)).flatten(1).mean(1)
    torch.testing.assert_close(torch.tensor(found).double(), nats / math.log(2), atol=2e-3, rtol=0)

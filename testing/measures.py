"""Measures that tests and benchmarks share: exact densities of runs in the host, and the nodes that are asked for them."""

import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler as custom
from torch.autograd import forward_ad

from ..dg_core import log_density as ld
from ..dg_core.control import gain_of, guided_steps
from ..dg_core.schedule import Schedule
from ..dg_core.units import nats_to_bits_per_dim
from ..nodes import DensityTargetSampler, ScoreAlignmentCheck
from ..nodes.host import target_run as dt
from ..nodes.host.model_access import path_of
from . import host_runs as h


def cut_schedule(model):
    """32 steps that end above zero noise, where the exact density can be read."""
    return h.schedule(model, 33)[:-1]


def exact_bits(model, samples, sigmas):
    """Bits per dimension of what the exact-density model gave, at the last of `sigmas`: (B,)."""
    base = model.model
    s = path_of(base.model_sampling).s(float(sigmas[-1]))
    return base.density.bits_per_dim(base.process_latent_in(samples.double()), s)


def target_sampler(target=dt.SHIFT, value=0.0, reference_image=-1, tolerance=0.002, max_passes=3, probes=1):
    return h.outputs(DensityTargetSampler, target, value, reference_image, tolerance, max_passes, probes)[0]


def mean_image(density):
    """The mean of an exact density, (1, 3, size, size): its prediction where the noise is all there is."""
    return density.denoised(torch.zeros(1, 3, density.size, density.size, dtype=torch.float64), 1e9)


def predicted_bits(quantile, dim, path, sigmas):
    """Bits per dimension that guidance itself adds at a quantile over the whole schedule."""
    log_range = guided_steps(Schedule(path, sigmas.tolist())).log_range
    return nats_to_bits_per_dim(gain_of(quantile, 0.0, dim, log_range)[0] * log_range, dim)


def exact_divergence(sampler, model):
    """The same sampler with the exact trace in place of probes."""
    density, path = model.model.density, path_of(model.model.model_sampling)
    pure = mean_image(density).float()

    def evaluate(x, sigma, call):
        alpha, s = path.alpha(sigma), path.s(sigma)
        if alpha <= 0:
            zero = torch.zeros(len(x), dtype=torch.float64)
            return ld.Evaluation(pure.expand_as(x), zero, zero)
        y = x.double() / alpha
        trace = density.dim + s**2 * density.laplacian(y, s)
        return ld.Evaluation(density.denoised(y, s).float(), trace, torch.zeros_like(trace))

    return dt.TargetSampler(sampler.settings, new_evaluate=lambda: evaluate)


def guider(model, positive=None):
    return h.outputs(custom.BasicGuider, model, h.conditioning() if positive is None else positive)[0]


def check(
    model,
    method="with score",
    steps=32,
    batch=2,
    positive=None,
    end_percent=0.95,
    probes=1,
    seed=0,
    latent=None,
    noise=None,
    sigmas=None,
    **optional,
):
    """The outputs of ScoreAlignmentCheck: aligned, cosine, report, plot, latent, scale, response."""
    latent = h.empty_latent(batch, model.model.density.size) if latent is None else latent
    return h.outputs(
        ScoreAlignmentCheck,
        guider(model, positive),
        h.random_noise() if noise is None else noise,
        latent,
        h.schedule(model, steps) if sigmas is None else sigmas,
        method,
        end_percent,
        probes,
        seed,
        **optional,
    )


def without_forward_mode(model):
    """The model with its tangent dropped, as by a patch that leaves the graph."""
    model = h.kept(model.clone())
    model.add_wrapper(
        WrappersMP.APPLY_MODEL, lambda executor, x, *args, **kwargs: executor(forward_ad.unpack_dual(x).primal, *args, **kwargs)
    )
    return model

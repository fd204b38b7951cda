"""Every model family of the host, tiny and with random weights, under every node of the pack.

    python3 run.py bench architectures

Writes docs/architectures.json. Three minutes.
"""

import json
from functools import lru_cache

import numpy as np
import torch

from ..dg_core.prior import prior_norm
from ..nodes import DensityTargetSampler, DensityTrace, LogDensity, ScoreAlignmentCheck, StochasticDetailVariation
from ..testing import host_runs as h
from ..testing import steering, tiny_models
from ..testing.applied import APPLIED, Run
from .pages import publish

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS, QUANTILE = 4, 0.2


@lru_cache(maxsize=1)
def _built(name, dtype):
    return tiny_models.build(name, DTYPES[dtype])


def sampled(name, run):
    """(samples, what the host asked of the model)."""
    family = tiny_models.FAMILIES[name]
    model, seen = h.recording(run.model)
    samples = h.sampled(
        model,
        run.sampler,
        h.schedule(model, STEPS),
        {"samples": tiny_models.latent(name)},
        noise=run.noise,
        positive=tiny_models.conditioning(name, 1),
        negative=tiny_models.conditioning(name, 2),
        cfg=family.cfg,
    )
    return samples, seen


@lru_cache(maxsize=1)
def plain(name, dtype):
    """The run without the pack: (`Run`, samples, what was seen)."""
    h.forget_models()
    run = Run(h.kept(_built(name, dtype).clone()), h.core_sampler("euler"), h.random_noise())
    return run, *sampled(name, run)


def measure(name, dtype, node):
    """What one node does to one family with weights of `dtype` ("fp32", "bf16").

    neutral: whether neutral settings leave every bit; finite; calls: model calls against the plain run; error: of the
    guidance (or of the noise's norm) against its definition, relative; eta: smallest and largest eta of the run.
    """
    applied = APPLIED[node]
    run, unguided, before = plain(name, dtype)
    neutral, _ = sampled(name, applied.apply(run, None))
    guided, seen = sampled(name, applied.apply(run, QUANTILE))
    sigmas = h.schedule(run.model, STEPS).tolist()
    result = {
        "neutral": torch.equal(neutral, unguided),
        "finite": bool(torch.isfinite(guided).all()) and not torch.equal(guided, unguided),
        "calls": seen.calls - before.calls,
    }
    if applied.steers:
        error, shares = steering.deviation(run.model, seen, sigmas, QUANTILE)
        return {**result, "error": error, "eta": [1 + share for share in shares]}
    # The first state is the noise, scaled by the model's own factor.
    latent = {"samples": tiny_models.latent(name)}
    unscaled = run.noise.generate_noise(latent).flatten(1).norm(dim=1)
    wanted = prior_norm(QUANTILE, latent["samples"][0].numel()) / unscaled
    ratio = seen.x[0].flatten(1).norm(dim=1) / before.x[0].flatten(1).norm(dim=1)
    return {**result, "error": float((ratio / wanted - 1).abs().max())}


def variation(strength, correction):
    return h.outputs(StochasticDetailVariation, 0.5, 0.0, "everything", strength, 0.0, 1.0, 1, correction, 1)[0]


def read(name, dtype):
    """What the nodes do that vary, trace, read, target and check, by their ids: {"finite": ...}, and what each is known by.

    neutral: whether every bit is that of the run without the node. bits_per_dim, cosine: the node's output.
    """
    run, unguided, _ = plain(name, dtype)
    family, latent, sigmas = tiny_models.FAMILIES[name], {"samples": tiny_models.latent(name)}, h.schedule(run.model, STEPS)
    guider = h.outputs(
        h.custom.CFGGuider, run.model, tiny_models.conditioning(name, 1), tiny_models.conditioning(name, 2), family.cfg
    )[0]
    finite = lambda samples: bool(torch.isfinite(samples).all())
    own, still, varied, target = (
        sampled(name, run._replace(sampler=sampler))[0]
        for sampler in (
            h.guided_sampler(),
            variation(0.0, "expected"),
            variation(0.5, "exact"),
            h.outputs(DensityTargetSampler, "shift from the unguided run", 0.02, -1, 0.01, 1, 1)[0],
        )
    )
    traced = h.outputs(DensityTrace, run.noise, guider, run.sampler, sigmas, latent, True)[0]["samples"]
    bits = h.outputs(LogDensity, guider, {"samples": unguided}, STEPS, 1, 0, 0.3)[0]
    cosine = h.outputs(ScoreAlignmentCheck, guider, run.noise, latent, sigmas, "with score", 0.95, 1, 0)[1]
    return {
        "StochasticDetailVariation": {
            "neutral": torch.equal(still, own),
            "finite": finite(varied) and not torch.equal(varied, own),
        },
        "DensityTrace": {"neutral": torch.equal(traced, unguided), "finite": finite(traced)},
        "LogDensity": {"finite": bool(np.isfinite(bits).all()), "bits_per_dim": bits},
        "DensityTargetSampler": {"finite": finite(target)},
        "ScoreAlignmentCheck": {"finite": bool(np.isfinite(cosine)), "cosine": cosine},
    }


def refusal(name, node):
    """(message of the error, model calls before it) of a family that cannot be guided."""
    run = Run(h.kept(_built(name, "fp32").clone()), h.core_sampler("euler"), h.random_noise())
    run = APPLIED[node].apply(run, QUANTILE)
    model, seen = h.recording(run.model)
    try:
        sampled(name, run._replace(model=model))
    except ValueError as error:
        return str(error), seen.calls
    return "", seen.calls


def describe(name):
    model = _built(name, "fp32")
    return {
        "title": tiny_models.FAMILIES[name].title,
        "class": f"{type(model.model).__name__}, {model.model.model_type.name}",
        "latent": list(tiny_models.FAMILIES[name].shape),
        "weights": sum(p.numel() for p in model.model.parameters()),
        "cfg": tiny_models.FAMILIES[name].cfg,
    }


def main():
    families = {}
    for name in tiny_models.FAMILIES:
        families[name] = describe(name)
        if name in tiny_models.REFUSED:
            families[name]["refused"] = refusal(name, "DensityGuidanceSampler")[0]
        else:
            families[name] |= {"runs": {}, "read": {}}
            for dtype in DTYPES:
                families[name]["runs"][dtype] = {node: measure(name, dtype, node) for node in APPLIED}
                families[name]["read"][dtype] = read(name, dtype)
        print(name, json.dumps(families[name], default=str)[:160], flush=True)
    publish(
        "architectures",
        {
            "steps": STEPS,
            "quantile": QUANTILE,
            "nodes": list(APPLIED),
            "readers": list(families["sd15"]["read"]["fp32"]),
            "families": families,
        },
    )

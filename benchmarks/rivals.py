"""What a user would pick instead of density guidance, set to give as much detail, and how the results compare.

Detail is the mean size of the images as PNG files. All runs have the same noises, the same number of model calls and,
where they leave the choice, the sampler euler.
"""

import comfy.samplers
import numpy as np
import scipy.optimize
import torch
from comfy_extras.nodes_eps import EpsilonScaling, TemporalScoreRescaling

from ..nodes import DensityGuidanceSampler
from ..testing.demo_runs import Demo, png_bytes
from ..testing.held_out import HeldOut, composition_change, low_frequencies

QUANTILE = 0.2  # of the guided run whose detail the others have to reach
SEARCH_SEEDS, SEARCH_CALLS = 8, 7
TOLERANCE = 0.002  # of the mean size


def euler(_):
    return comfy.samplers.sampler_object("euler")


def guided(shift, quantile=0.5, sampler="euler"):
    """What makes a Density Guidance Sampler around a sampler of the host, or with its own solver (None)."""
    inner = sampler and comfy.samplers.sampler_object(sampler)
    return lambda _: DensityGuidanceSampler.execute(quantile, shift, 0.0, 1.0, inner)[0]


def ancestral(eta, s_noise=1.0):
    return lambda _: comfy.samplers.ksampler("euler_ancestral", {"eta": eta, "s_noise": s_noise})


OWN = "Density Guidance Sampler, own solver"
# name -> (the range of strengths to search, (demo, steps, strength) -> arguments of `Demo.run`); tables.py names the strengths
RIVALS = {
    "Density Guidance Sampler, euler": ((0.0, 1.0), lambda demo, steps, v: {"sampler": guided(v)}),
    OWN: ((-0.2, 1.0), lambda demo, steps, v: {"sampler": guided(v, sampler=None)}),
    "Epsilon Scaling": (
        (1.0, 1.5),
        lambda demo, steps, v: {"sampler": euler, "model": EpsilonScaling.execute(demo.model, v)[0]},
    ),
    # it fails on more than one image at once
    "TSR": (
        (1.0, 0.1),
        lambda demo, steps, v: {"sampler": euler, "batch": 1, "model": TemporalScoreRescaling.execute(demo.model, v, 1.0)[0]},
    ),
    "scaled starting noise": ((1.0, 2.0), lambda demo, steps, v: {"sampler": euler, "noise": demo.noise(0.5, v)}),
    "euler_ancestral, eta": ((0.0, 1.0), lambda demo, steps, v: {"sampler": ancestral(v)}),
    "euler_ancestral, s_noise": ((0.8, 2.0), lambda demo, steps, v: {"sampler": ancestral(1.0, v)}),
    # two model calls a step: half as many steps
    "raised CFG": ((1.01, 10.0), lambda demo, steps, v: {"sampler": euler, "cfg": v, "steps": steps // 2}),
}


def strength_for(size, target, low, high):
    """(strength from low to high at which size(strength) is `target`, d size / d strength there); where there is none, the
    end that comes nearer, and None."""
    seen = {v: size(v) for v in (low, high)}

    def excess(v):
        if v not in seen:
            seen[v] = size(v)
        return seen[v] / target - 1

    if excess(low) * excess(high) > 0:
        return min(seen, key=lambda v: abs(excess(v))), None
    strength = scipy.optimize.brentq(excess, low, high, xtol=1e-4, rtol=1e-3, maxiter=SEARCH_CALLS, disp=False)
    # sizes of neighbours closer than this differ by chance
    apart = [v for v in seen if abs(v - strength) > 0.05 * abs(high - low)]
    other = min(apart, key=lambda v: abs(v - strength))
    return strength, (target - seen[other]) / (strength - other)


def compare(seeds, steps):
    """{"target": ..., "rows": {method: what it does}, and what they are to be compared with}."""
    demo, few, held_out = Demo(seeds), Demo(min(SEARCH_SEEDS, seeds)), HeldOut()

    def sizes(demo, arguments):
        result = demo.run(**{"steps": steps, **arguments})
        return png_bytes(demo.images(result.samples)), result.samples.clamp(-1, 1)

    plain_bytes, plain = sizes(demo, {"sampler": euler})
    few_target = sizes(few, {"sampler": guided(0.0, QUANTILE)})[0].mean()
    target = sizes(demo, {"sampler": guided(0.0, QUANTILE)})[0].mean()

    def row(strength, size, samples, base=(plain_bytes, plain)):
        change = size / base[0]
        distance, error = held_out.distance(samples)
        return {
            "strength": strength,
            "png": float(size.mean()),
            "spread": float(size.std() / size.mean()),
            "change_spread": float(change.std() / change.mean()),
            "frechet": distance,
            "frechet_error": error,
            "composition": composition_change(samples, base[1]),
        }

    rows = {"unguided, euler": row(None, plain_bytes, plain)}
    for name, (search, arguments) in RIVALS.items():
        strength, slope = strength_for(lambda v: sizes(few, arguments(few, steps, v))[0].mean(), few_target, *search)
        size, samples = sizes(demo, arguments(demo, steps, strength))
        if slope is not None and abs(size.mean() / target - 1) > TOLERANCE:  # the few seeds of the search are not all
            strength = float(np.clip(strength + (target - size.mean()) / slope, min(search), max(search)))
            size, samples = sizes(demo, arguments(demo, steps, strength))
        base = sizes(demo, arguments(demo, steps, 0.0)) if name == OWN else (plain_bytes, plain)
        rows[name] = row(strength, size, samples, base)
        print(name, rows[name], flush=True)
    low = low_frequencies(plain)
    same_class = torch.stack([low[demo.classes == kind].var(0) for kind in demo.classes.unique()])
    distance, error = held_out.distance(HeldOut.draw(False, seeds, 8))
    return {
        "quantile": QUANTILE,
        "target": float(target),
        "rows": rows,
        "held_out_images": held_out.images,
        "training_frechet": distance,
        "training_frechet_error": error,
        "seeds_apart": float((2 * same_class).mean().sqrt()),
    }

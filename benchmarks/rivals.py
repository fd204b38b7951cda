"""What a user would pick instead of density guidance, set to give as much detail, and how the results compare.

Detail is the mean size of the pictures as PNG files. All runs have the same noises, the same number of model calls and,
where they leave the choice, the sampler euler.
"""

import comfy.samplers
import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from comfy_extras.nodes_eps import EpsilonScaling, TemporalScoreRescaling

from ..nodes import DensityGuidanceSampler
from ..nodes.builtin import demo
from ..testing.demo_runs import PICTURES, Demo, band_energy, png_bytes
from ..training.demo_pictures import Pictures

QUANTILE = 0.2  # of the guided run whose detail the others have to reach
HELD_OUT_CROPS = 1024
SEARCH_SEEDS, SEARCH_CALLS = 8, 7
TOLERANCE = 0.002  # of the mean size
BANDS = np.geomspace(0.03, 1.42, 9)  # radii, Nyquist = 1
BOOTSTRAPS = 200
LOW = 0.125  # radius below which a picture's composition is, Nyquist = 1


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
    "Epsilon Scaling": ((1.0, 1.5), lambda demo, steps, v: {
        "sampler": euler, "model": EpsilonScaling.execute(demo.model, v)[0]}),
    # it fails on more than one picture at once
    "TSR": ((1.0, 0.1), lambda demo, steps, v: {
        "sampler": euler, "batch": 1, "model": TemporalScoreRescaling.execute(demo.model, v, 1.0)[0]}),
    "scaled starting noise": ((1.0, 2.0), lambda demo, steps, v: {
        "sampler": euler, "noise": demo.noise(0.5, v)}),
    "euler_ancestral, eta": ((0.0, 1.0), lambda demo, steps, v: {"sampler": ancestral(v)}),
    "euler_ancestral, s_noise": ((0.8, 2.0), lambda demo, steps, v: {"sampler": ancestral(1.0, v)}),
    # two model calls a step: half as many steps
    "raised CFG": ((1.01, 10.0), lambda demo, steps, v: {"sampler": euler, "cfg": v, "steps": steps // 2}),
}


FEATURES = len(BANDS) - 1 + 2 * 3


def features(samples):
    """Fixed numbers of pictures (n, 3, H, W) in [-1, 1], (n, FEATURES): texture by scale, and colour.

    Logarithms of the energy in the bands of spatial frequency; mean and standard deviation of each channel.
    """
    bands = [band_energy(samples, low, high).log() for low, high in zip(BANDS, BANDS[1:])]
    flat = samples.double().flatten(2)
    return torch.cat([torch.stack(bands, 1), flat.mean(2), flat.std(2)], 1).numpy()


def frechet(a, b):
    """Frechet distance between Gaussians fitted to the rows of two arrays."""
    means, covariances = zip(*((v.mean(0), np.cov(v, rowvar=False)) for v in (a, b)))
    cross = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * cross))


class HeldOut:
    """Features of held-out pictures, scaled to unit variance, to measure the distance of others to them."""

    def __init__(self, count=HELD_OUT_CROPS):
        values = features(self.draw(True, count, 7))
        self.pictures = len(Pictures(PICTURES, True).pictures)
        self.mean, self.std = values.mean(0), values.std(0)
        self.values = (values - self.mean) / self.std

    @staticmethod
    def draw(held_out, count, seed):
        return Pictures(PICTURES, held_out).draw(count, demo.SIZE, torch.Generator().manual_seed(seed))[0]

    def distance(self, samples):
        """(Frechet distance, its standard deviation over bootstraps of the samples)."""
        values = (features(samples) - self.mean) / self.std
        drawn = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAPS, len(values)))
        return frechet(values, self.values), float(np.std([frechet(values[i], self.values) for i in drawn]))


def low_frequencies(samples):
    """The pictures' composition: below the radius LOW."""
    f = 2 * torch.fft.fftfreq(samples.shape[-1], dtype=torch.float64)
    return torch.fft.ifft2(torch.fft.fft2(samples.double()) * (torch.hypot(f[:, None], f[None, :]) < LOW)).real


def composition_change(samples, plain):
    """Root mean square difference below the radius LOW between pairs of pictures."""
    return float((low_frequencies(samples) - low_frequencies(plain)).square().mean().sqrt())


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
        return {"strength": strength, "png": float(size.mean()), "spread": float(size.std() / size.mean()),
                "change_spread": float(change.std() / change.mean()), "frechet": distance, "frechet_error": error,
                "composition": composition_change(samples, base[1])}

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
    return {"quantile": QUANTILE, "target": float(target), "rows": rows, "held_out_pictures": held_out.pictures,
            "training_frechet": distance, "training_frechet_error": error,
            "seeds_apart": float((2 * same_class).mean().sqrt())}

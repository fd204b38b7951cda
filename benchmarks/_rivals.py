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

from ..nodes import DensityGuidanceSampler, demo_model
from ..training.demo_pictures import Pictures
from ._demo_runs import PICTURES, Demo, band_energy, png_bytes

QUANTILE = 0.2  # of the guided run whose detail the others have to reach
HELD_OUT_CROPS = 1024
SEARCH_SEEDS, SEARCH_CALLS = 8, 7
TOLERANCE = 0.002  # of the mean size
BANDS = np.geomspace(0.04, 1.42, 9)  # radii, Nyquist = 1
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
# name -> (what its strength is, the range to search, (demo, steps, strength) -> arguments of `Demo.run`)
RIVALS = {
    "Density Guidance Sampler, euler": ("detail_shift", (0.0, 1.0), lambda demo, steps, v: {"sampler": guided(v)}),
    OWN: ("detail_shift", (-0.2, 1.0), lambda demo, steps, v: {"sampler": guided(v, sampler=None)}),
    "Epsilon Scaling": ("scaling_factor", (1.0, 1.5), lambda demo, steps, v: {
        "sampler": euler, "model": EpsilonScaling.execute(demo.model, v)[0]}),
    # it fails on more than one picture at once
    "TSR": ("tsr_k", (1.0, 0.1), lambda demo, steps, v: {
        "sampler": euler, "batch": 1, "model": TemporalScoreRescaling.execute(demo.model, v, 1.0)[0]}),
    "scaled starting noise": ("scale", (1.0, 2.0), lambda demo, steps, v: {
        "sampler": euler, "noise": demo.noise(0.5, v)}),
    "euler_ancestral, eta": ("eta", (0.0, 1.0), lambda demo, steps, v: {"sampler": ancestral(v)}),
    "euler_ancestral, s_noise": ("s_noise", (0.8, 2.0), lambda demo, steps, v: {"sampler": ancestral(1.0, v)}),
    # two model calls a step: half as many steps
    "raised CFG": ("cfg", (1.01, 10.0), lambda demo, steps, v: {"sampler": euler, "cfg": v, "steps": steps // 2}),
}


def features(samples):
    """Fixed numbers of pictures (n, 3, H, W) in [-1, 1], (n, 14): texture by scale, and colour.

    Logarithms of the energy in eight bands of spatial frequency; mean and standard deviation of each channel.
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
        drawn = self.draw(count, 7)
        values = features(drawn)
        self.mean, self.std = values.mean(0), values.std(0)
        self.values = (values - self.mean) / self.std

    @staticmethod
    def draw(count, seed):
        return Pictures(PICTURES, True).draw(count, demo_model.SIZE, torch.Generator().manual_seed(seed))[0]

    def distance(self, samples):
        return frechet((features(samples) - self.mean) / self.std, self.values)


def low_frequencies(samples):
    """The pictures' composition: below the radius LOW."""
    f = 2 * torch.fft.fftfreq(samples.shape[-1], dtype=torch.float64)
    return torch.fft.ifft2(torch.fft.fft2(samples.double()) * (torch.hypot(f[:, None], f[None, :]) < LOW)).real


def drift(samples, plain):
    """Root mean square difference of composition between pairs of pictures."""
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
    one, other = sorted(seen, key=lambda v: abs(v - strength))[:2]
    return strength, (seen[one] - seen[other]) / (one - other)


def compare(seeds, steps):
    """{"target": ..., "rows": {method: what it does}, and what they are to be compared with}."""
    demo, few, held_out = Demo(seeds), Demo(min(SEARCH_SEEDS, seeds)), HeldOut()

    def sizes(demo, arguments):
        result = demo.run(**{"steps": steps, **arguments})
        return png_bytes(demo.images(result.samples)), result.samples.clamp(-1, 1)

    plain_bytes, plain = sizes(demo, {"sampler": euler})
    few_target = sizes(few, {"sampler": guided(0.0, QUANTILE)})[0].mean()
    target = sizes(demo, {"sampler": guided(0.0, QUANTILE)})[0].mean()

    def row(strength, size, samples, unguided=plain):
        change = size / plain_bytes
        return {"strength": strength, "png": float(size.mean()), "spread": float(size.std() / size.mean()),
                "change_spread": float(change.std() / change.mean()), "frechet": held_out.distance(samples),
                "drift": drift(samples, unguided)}

    rows = {"unguided, euler": row(None, plain_bytes, plain)}
    for name, (_, search, arguments) in RIVALS.items():
        strength, slope = strength_for(lambda v: sizes(few, arguments(few, steps, v))[0].mean(), few_target, *search)
        size, samples = sizes(demo, arguments(demo, steps, strength))
        if slope is not None and abs(size.mean() / target - 1) > TOLERANCE:  # the few seeds of the search are not all
            strength = float(np.clip(strength + (target - size.mean()) / slope, min(search), max(search)))
            size, samples = sizes(demo, arguments(demo, steps, strength))
        unguided = sizes(demo, arguments(demo, steps, 0.0))[1] if name == OWN else plain
        rows[name] = row(strength, size, samples, unguided)
        print(name, rows[name], flush=True)
    other = low_frequencies(plain)
    return {"quantile": QUANTILE, "target": float(target), "rows": rows,
            "held_out_frechet": held_out.distance(HeldOut.draw(seeds, 8)),
            "seeds_apart": float((2 * other.var(0)).mean().sqrt())}

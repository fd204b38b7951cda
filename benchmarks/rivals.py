"""What a user would pick instead of density guidance, set to give as much detail, and how the results compare.

    DETAIL_DAEMON=PATH python3 run.py bench rivals

DETAIL_DAEMON: the folder of ComfyUI-Detail-Daemon; without it that rival is left out. Needs the images of
training/demo_images.py in .host/data/. Writes docs/rivals.json after each method. About two hours of one core.

Detail is the mean size of the images as PNG files. All runs have the same noises, steps and sampler, one whose unguided images
no longer change with more steps.
"""

import os

import comfy.samplers
import torch
from comfy_extras.nodes_eps import EpsilonScaling, TemporalScoreRescaling
from scipy.interpolate import PchipInterpolator

from ..nodes import DensityGuidanceSampler
from ..nodes.builtin import demo as demo_model
from ..testing.demo_runs import Demo, png_bytes, require_images, spectrum
from ..testing.held_out import HeldOut, composition_change
from .cost import VARIABLE, detail_daemon
from .pages import digest, publish, still_true
from .paper_experiments import guided

CODE = ["dg_core/*.py", "nodes/**/*.py", "testing/demo_runs.py", "testing/held_out.py", "benchmarks/rivals.py"]
SEEDS, STEPS, INNER = 14, 24, "deis"
CHANGES = (0.06, 0.12, -0.06)  # of the mean PNG size
CFGS = (3.0, 7.0)
RADII = (0.0, 0.125, 0.5, 1.42)  # of spatial frequency, Nyquist = 1
TOLERANCE = 0.002  # of the mean size


def inner():
    return comfy.samplers.sampler_object(INNER)


def ours(start):
    return lambda demo, v: {"sampler": lambda _: DensityGuidanceSampler.execute(0.5, v, start, 1.0, inner())[0]}


def patched(node, *more, **arguments):
    """A node of the host that changes the model by a strength."""
    return lambda demo, v: {"sampler": lambda _: inner(), "model": node.execute(demo.model, v, *more)[0], **arguments}


def daemon(node):
    """Detail Daemon's sampler node, with its own defaults."""
    settings = {"start": 0.2, "end": 0.8, "bias": 0.5, "exponent": 1.0, "start_offset": 0.0, "end_offset": 0.0, "fade": 0.0}
    settings |= {"smooth": True, "cfg_scale_override": 0.0}
    return lambda demo, v: {"sampler": lambda _: node().go(inner(), detail_amount=v, **settings)[0]}


# name -> (name of the strength, what is neutral, strengths to try, (demo, strength) -> arguments of `Demo.run`)
RIVALS = {
    "Density Guidance Sampler": ("detail_shift", 0.0, (-0.08, -0.03, 0.05, 0.12, 0.25), ours(0.0)),
    "Density Guidance Sampler, from 30%": ("detail_shift", 0.0, (-0.2, -0.08, 0.08, 0.2, 0.4), ours(0.3)),
    "Density Guidance Sampler, from 50%": ("detail_shift", 0.0, (-0.4, -0.15, 0.15, 0.4, 0.8), ours(0.5)),
    "Detail Daemon": ("detail_amount", 0.0, (-0.4, -0.15, 0.15, 0.4, 0.9), None),
    "Epsilon Scaling": ("scaling_factor", 1.0, (0.98, 0.99, 0.995, 1.005, 1.01, 1.02), patched(EpsilonScaling)),
    # it fails on more than one image at once
    "TSR": ("tsr_k", 1.0, (0.8, 0.9, 0.95, 1.05, 1.1), patched(TemporalScoreRescaling, 1.0, batch=1)),
    "scaled starting noise": (
        "scale",
        1.0,
        (0.92, 0.96, 1.03, 1.06, 1.12),
        lambda demo, v: {"sampler": lambda _: inner(), "noise": demo.noise(0.5, v)},
    ),
}


def strength_for(sizes, neutral, target):
    """The strength nearest `neutral` at which the mean size, {strength: size}, passes the target; None where it never does."""
    strengths = sorted(sizes)
    roots = PchipInterpolator(strengths, [sizes[v] for v in strengths]).solve(target, extrapolate=False)
    return min(map(float, roots), key=lambda v: abs(v - neutral), default=None)


def correlations(samples, plain):
    """Of images with the unguided ones, mean over seeds and channels, in the bands of RADII."""
    a, b = (torch.fft.fft2(v.double()) for v in (samples, plain))
    radius = spectrum(plain)[1]
    found = []
    for low, high in zip(RADII, RADII[1:]):
        band = (radius >= max(low, 1e-9)) & (radius < high)
        x, y = a[..., band], b[..., band]
        found.append(float(((x * y.conj()).real.sum(-1) / (x.abs().square().sum(-1) * y.abs().square().sum(-1)).sqrt()).mean()))
    return found


class Comparison:
    """Runs of the methods on the same noises, and what they make of the unguided images."""

    def __init__(self):
        self.demo, self.held_out = Demo(SEEDS), HeldOut()
        self.base = {cfg: self.run({"sampler": lambda _: inner()}, cfg) for cfg in (1.0, *CFGS)}

    def run(self, arguments, cfg=1.0):
        """(PNG bytes by seed, images)"""
        result = self.demo.run(**{"steps": STEPS, "cfg": cfg, **arguments})
        return png_bytes(self.demo.images(result.samples)), result.samples.clamp(-1, 1)

    def row(self, strength, size, samples, cfg=1.0):
        bytes_, plain = self.base[cfg]
        change = size / bytes_
        distance, error = self.held_out.distance(samples)
        return {
            "strength": strength,
            "png": float(size.mean()),
            "change": float(size.mean() / bytes_.mean() - 1),
            "change_spread": float(change.std()),
            "composition": composition_change(samples, plain),
            "correlations": correlations(samples, plain),
            "frechet": distance,
            "frechet_error": error,
        }

    def method(self, neutral, strengths, arguments):
        """{change: the row at the strength that makes it, None where none does}, and at the first one under CFG."""
        sizes = {neutral: self.base[1.0][0].mean()} | {v: self.run(arguments(self.demo, v))[0].mean() for v in strengths}
        rows = {}
        for change in CHANGES:
            target = sizes[neutral] * (1 + change)
            strength = strength_for(sizes, neutral, target)
            for _ in range(3):
                if strength is None:
                    rows[str(change)] = None
                    break
                size, samples = self.run(arguments(self.demo, strength))
                rows[str(change)] = self.row(strength, size, samples)
                if abs(size.mean() / target - 1) < TOLERANCE:
                    break
                sizes[strength] = size.mean()
                strength = strength_for(sizes, neutral, target)
        if first := rows[str(CHANGES[0])]:
            strength = first["strength"]
            rows |= {f"cfg {cfg:g}": self.row(strength, *self.run(arguments(self.demo, strength), cfg), cfg) for cfg in CFGS}
        return {"tried": list(strengths), "rows": rows}


def converged(comparison):
    """Of unguided images: PNG bytes, and distance to those of four times the steps with the pack's own solver."""
    size, samples = comparison.base[1.0]
    fine = comparison.demo.run(guided(0.5), 4 * STEPS).samples.clamp(-1, 1)
    return {
        "png": float(size.mean()),
        "fine_png": float(png_bytes(comparison.demo.images(fine)).mean()),
        "distance": float((samples - fine).square().mean().sqrt()),
    }


def main():
    torch.set_num_threads(1)
    require_images()
    folder = os.environ.get(VARIABLE)
    if not folder:
        print(f"{VARIABLE} is not set: Detail Daemon is left out. Set it to the folder of ComfyUI-Detail-Daemon.")
    results = still_true("rivals", CODE, weights=digest([demo_model.WEIGHTS]), seeds=SEEDS, steps=STEPS, inner=INNER)
    comparison = Comparison()
    if "converged" not in results:
        results["converged"] = converged(comparison)
    found = results.setdefault("methods", {})
    for name, (setting, neutral, strengths, arguments) in RIVALS.items():
        if name not in found and (arguments or folder):
            arguments = arguments or daemon(detail_daemon(folder))
            found[name] = {"setting": setting, **comparison.method(neutral, strengths, arguments)}
            print(name, found[name], flush=True)
            publish("rivals", results)

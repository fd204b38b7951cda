"""What every node samples is what it sampled when the file was made: see testing/recorded_samples.py."""

import os
from functools import lru_cache

import pytest
from density_guidance.testing import host_runs as h
from density_guidance.testing import recorded_samples

WHICH = os.environ.get("DENSITY_GUIDANCE_SAMPLES", "some")  # or "all", or "record"
OF_V = ("v, own: both, window", "v, euler: quantile")  # v is the same function as eps, see tests/test_exact_model.py
SLOW = ("unet v", "bfloat16, variation", ": with score", ": without score", "bits per dimension")  # others have their parts
ALIKE = (
    "eps, target",
    "eps, trace",
    "eps, alignment",
    "eps, log",
    "eps, variation",
    "euler: inpainting",
    "smoothest",
    "both, window",
)
# Relative to the largest number of a run: rounding in float32 and what 8 steps make of it; more where the number is a
# derivative or found by passes that correct each other. In bfloat16, with a rounding unit of 0.004, each processor's
# kernels add in their own order: one machine's AVX2, AVX-512 and AMX differ by up to 0.005.
TOLERANCE, LOOSE, OF_BFLOAT16 = 2e-5, 1e-3, 2e-2
LOOSELY = ("target", "alignment", ", log-density")
NAMES = [
    name
    for name in recorded_samples.recorded()
    if WHICH == "all" or name in OF_V or not (name.startswith("v, ") or any(word in name for word in SLOW + ALIKE))
]


@lru_cache
def runs():
    return recorded_samples.runs()


@lru_cache
def recorded():
    return recorded_samples.recorded()


@pytest.mark.skipif(WHICH != "record", reason="to record anew, set DENSITY_GUIDANCE_SAMPLES=record")
def test_record():
    with h.without_plots():
        recorded_samples.record()


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_the_recorded_ones(name):
    with h.without_plots():
        found = recorded_samples.kept(runs()[name]())
    wanted = recorded()[name]
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    error = float((found - wanted).abs().max() / wanted.abs().max())
    tolerance = OF_BFLOAT16 if "bfloat16" in name else LOOSE if any(word in name for word in LOOSELY) else TOLERANCE
    assert error <= tolerance, f"{error:.1e}"


def test_every_run_is_recorded():
    assert set(runs()) == set(recorded())

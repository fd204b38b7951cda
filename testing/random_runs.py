"""Random runs: any combination gives a clear error before any model call, or a finite image and an unchanged host."""

import gc
from collections import Counter
from functools import lru_cache

import comfy.samplers
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ..dg_core.variation import CORRECTIONS, MAX_STRENGTH
from ..nodes import DensityTargetSampler, PriorGuidanceModel, PriorGuidanceScale, StochasticDetailVariation
from ..nodes.host.target_run import ABSOLUTE, SAME, SHIFT
from ..nodes.host.variation_run import VARIATION_SEED, VARY
from . import host_runs as h
from . import tiny_models

FAMILIES = "sd2 sd3 flux wan21 qwen_image cosmos_predict2 stable_audio hunyuan3d chroma_radiance lotus".split()
INPUTS = (
    "quantile, detail_shift, start_percent, end_percent, scale, curve, mask, sampling type, sigmas are, reference_image".split(
        ", "
    )
)
OWN_SAMPLERS = ("StochasticDetailVariation", "DensityTargetSampler")

fraction = st.floats(0, 1, width=32)
window = st.tuples(fraction, fraction).map(sorted).filter(lambda w: w[0] < w[1])
quantile = st.sampled_from([0.001, 0.5, 0.999]) | st.floats(0.001, 0.999)
masks = st.none() | st.builds(
    lambda kind, n, height, width, seed: {
        "zero": torch.zeros(n, height, width),
        "one": torch.ones(n, height, width),
        "random": torch.rand(n, height, width, generator=torch.Generator().manual_seed(seed)),
    }[kind],
    st.sampled_from(["zero", "one", "random"]),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 99),
)
detail_shift = st.just(0.0) | st.floats(-2, 2)
windows = st.just([0.0, 1.0]) | window
quantiles = st.none() | st.lists(quantile, min_size=1, max_size=3)
guidance = st.fixed_dictionaries(
    {
        "node": st.sampled_from(["DensityGuidanceSampler", "DensityGuidanceModel"]),
        "quantile": quantile,
        "detail_shift": detail_shift,
        "window": windows,
        "quantiles": quantiles,
        "mask": masks,
        "curve": st.none() | st.lists(st.floats(0, 8), min_size=1, max_size=5).filter(any),
    }
)
variation = st.fixed_dictionaries(
    {
        "node": st.just("StochasticDetailVariation"),
        "quantile": quantile,
        "detail_shift": detail_shift,
        "window": windows,
        "quantiles": quantiles,
        "mask": masks,
        "vary": st.sampled_from(VARY.options),
        "strength": st.floats(0, MAX_STRENGTH),
        "seed": st.integers(0, VARIATION_SEED.high),
        "correction": st.sampled_from(list(CORRECTIONS)),
        "probes": st.integers(1, 2),
    }
)
target = st.fixed_dictionaries(
    {
        "node": st.just("DensityTargetSampler"),
        "target": st.sampled_from([ABSOLUTE, SHIFT, SAME]),
        "value": st.just(0.0) | st.floats(-20, 20),
        "reference": st.integers(-1, 3),
    }
)
prior = st.fixed_dictionaries(
    {
        "node": st.sampled_from(["PriorGuidanceScale", "PriorGuidanceModel"]),
        "quantile": quantile,
        "scale": st.floats(0, 10),
        "match": st.booleans(),
    }
)
quick = guidance | prior
runs = st.fixed_dictionaries(
    {
        "family": st.sampled_from(FAMILIES),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "sampler": st.sampled_from(comfy.samplers.SAMPLER_NAMES),
        "own": st.booleans(),
        "scheduler": st.sampled_from(comfy.samplers.SCHEDULER_NAMES),
        "steps": st.integers(1, 6),
        "denoise": st.just(1.0) | st.floats(0.05, 1),
        "batch": st.integers(1, 3),
        "seed": st.integers(0, 2**64 - 1),
        "cfg": st.sampled_from([1.0, 3.0]),
        "noise_mask": masks,
        "halved": st.tuples(st.booleans(), st.booleans()),
        "nodes": st.lists(quick | quick | quick | quick | quick | variation | target, min_size=1, max_size=3),
    }
)


@lru_cache
def _built(name, dtype):
    return tiny_models.build(name, dtype)


def _with_nodes(run, model, sampler, noise):
    """(model, sampler, noise) with the run's nodes in them, in their order."""
    if run["own"]:
        sampler = None
    for node in run["nodes"]:
        if node["node"] == "PriorGuidanceScale":
            noise = h.outputs(PriorGuidanceScale, noise, node["quantile"], node["scale"], node["match"])[0]
        elif node["node"] == "PriorGuidanceModel":
            model = h.kept(h.outputs(PriorGuidanceModel, model, node["quantile"], node["scale"], node["match"])[0])
        elif node["node"] == "DensityTargetSampler":
            sampler = h.outputs(DensityTargetSampler, node["target"], node["value"], node["reference"], 0.002, 1, 1)[0]
        elif node["node"] == "StochasticDetailVariation":
            sampler = h.outputs(
                StochasticDetailVariation,
                node["quantile"],
                node["detail_shift"],
                node["vary"],
                node["strength"],
                *node["window"],
                node["seed"],
                node["correction"],
                node["probes"],
                quantiles=node["quantiles"],
                mask=node["mask"],
            )[0]
        else:
            common = (node["quantile"], node["detail_shift"], *node["window"])
            more = {"mask": node["mask"], "curve": node["curve"], "quantiles": node["quantiles"]}
            if node["node"] == "DensityGuidanceModel":
                model = h.guided_model(model, *common, **more)
            else:
                sampler = h.guided_sampler(*common, sampler=sampler, **more)
    return model, h.guided_sampler() if sampler is None else sampler, noise


def host_state(model):
    """What must be the same after a run: the host's lists, torch's defaults and random state, the model's patches."""
    return {
        "samplers": tuple(comfy.samplers.SAMPLER_NAMES),
        "schedulers": tuple(comfy.samplers.SCHEDULER_NAMES),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "random": torch.random.get_rng_state().numpy().tobytes(),
        "options": repr(model.model_options),
        "patches": (len(model.patches), len(model.object_patches), len(model.wrappers), len(model.callbacks)),
    }


def check(run, seen=None):
    """Raise AssertionError unless one random run behaves; count what happened in `seen`, a Counter."""
    seen = Counter() if seen is None else seen
    model = h.kept(_built(run["family"], run["dtype"]).clone())
    recorded, calls = h.recording(model)
    generator = torch.Generator().manual_seed(1)
    shape = list(tiny_models.latent(run["family"], run["batch"]).shape)
    for axis, halved in zip((-1, -2) if len(shape) > 3 else (-1,), run["halved"]):
        shape[axis] //= 1 + halved
    latent = {"samples": torch.randn(shape, generator=generator)}
    if run["noise_mask"] is not None and latent["samples"].ndim == 4:
        latent["noise_mask"] = run["noise_mask"][:, None]
    conds = {
        "positive": tiny_models.conditioning(run["family"], 1),
        "cfg": run["cfg"],
        "negative": tiny_models.conditioning(run["family"], 2) if run["cfg"] > 1 else None,
    }

    def sample(model, sampler, noise):
        torch.manual_seed(2)
        sigmas = h.schedule(model, run["steps"], run["scheduler"], run["denoise"])
        return h.sampled(model, sampler, sigmas, latent, noise=noise, **conds)

    try:
        plain = sample(model, h.core_sampler(run["sampler"]), h.random_noise(run["seed"]))
    # some schedulers need more steps, some samplers more sigmas or a seed below the greatest
    except (ZeroDivisionError, RuntimeError, IndexError, ValueError):
        seen["not run by the host either"] += 1
        return
    before = host_state(recorded)
    source = latent["samples"].clone()
    try:
        arguments = _with_nodes(run, recorded, h.core_sampler(run["sampler"]), h.random_noise(run["seed"]))
        result = sample(*arguments)
    except ValueError as error:
        assert any(name in str(error) for name in INPUTS), f"unclear: {error}"
        assert calls.calls == 0, f"{error}, after {calls.calls} model calls"
        seen["refused with a reason"] += 1
        result = None
    after = host_state(recorded)
    if result is None or run["own"] or any(node["node"] in OWN_SAMPLERS for node in run["nodes"]):  # other draws
        before.pop("random"), after.pop("random")
    assert before == after, {k for k in before if before[k] != after[k]}
    assert torch.equal(latent["samples"], source), "the input latent was changed"
    if result is not None:
        assert result.shape == plain.shape and result.dtype == plain.dtype
        if torch.isfinite(plain).all():
            assert torch.isfinite(result).all(), "not finite"
            seen["finite"] += 1
        else:
            seen["not finite without the pack either"] += 1


def explore(count, number):
    """Run `count` examples, others for every `number`; returns the Counter of what happened."""
    seen = Counter()
    gc.freeze()  # the host collects garbage at every other run; what is there already need not be looked through

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(runs)
    def example(run):
        check(run, seen)

    example()
    return seen

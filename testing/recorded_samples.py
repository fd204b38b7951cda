"""A fixed set of runs of every node, and the file that holds what they gave.

Record them again, after a change that is meant to change samples, with the environment variable
DENSITY_GUIDANCE_SAMPLES=record and `python3 run.py test tests/test_recorded_samples.py`; with =all every run is compared,
those of "v" too.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .. import nodes as pack
from . import host_runs as h
from . import networks
from .measures import target_sampler

FILE = Path(__file__).resolve().parent / "recorded_samples.safetensors"
SIZE, STEPS = 32, 8
STRIDE = 7  # every seventh element of a latent is kept


def runs():
    """name -> function without arguments that gives a tensor; recorded one by one."""
    found = {}
    for prediction in h.PREDICTIONS:
        found |= {f"{prediction}, {name}": run for name, run in _on_the_exact_model(prediction).items()}
    return found | _on_networks() | _with_the_demo_model()


def kept(tensor):
    """What of a result is recorded: a tensor in float32, or float64 where numbers were returned."""
    return tensor.flatten()[:: STRIDE if tensor.ndim > 2 else 1].clone()


def record():
    """Run everything and write the file."""
    save_file({name: kept(run()).contiguous() for name, run in runs().items()}, FILE)


def recorded():
    """name -> what was recorded."""
    return load_file(FILE)


def _numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def _mask():
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, : SIZE // 2, : SIZE // 2] = 1
    mask[:, SIZE // 2 : 3 * SIZE // 4] = 0.4
    return mask


def _node(name, **inputs):
    return h.outputs(getattr(pack, name), **inputs)


_GUIDANCE = {"quantile": 0.5, "detail_shift": 0.0, "start_percent": 0.0, "end_percent": 1.0}
_VARIATION = {
    "quantile": 0.5,
    "detail_shift": 0.0,
    "vary": "everything",
    "strength": 1.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "variation_seed": 5,
    "correction": "expected",
    "probes": 1,
}


def _guided(sampler, **inputs):
    sampler = {} if sampler is None else {"sampler": h.core_sampler(sampler)}
    return _node("DensityGuidanceSampler", **{**_GUIDANCE, **inputs}, **sampler)[0]


def _varied(**inputs):
    return _node("StochasticDetailVariation", **{**_VARIATION, **inputs})[0]


def _on_the_exact_model(prediction):
    model = h.exact_model(prediction, SIZE)
    sigmas = h.schedule(model, STEPS)
    guider = h.outputs(h.custom.BasicGuider, model, h.conditioning(prediction))[0]

    empty = h.empty_latent(size=SIZE)

    def sample(make_sampler, latent=empty, noise=None, patched=None, schedule=None):
        schedule = (sigmas if schedule is None else schedule).clone()
        return lambda: h.sampled(
            patched() if patched else model, make_sampler(), schedule.clone(), latent=latent, noise=noise and noise()
        )

    settings = {
        "quantile": {"quantile": 0.3},
        "detail_shift": {"detail_shift": 0.4},
        "both, window": {"quantile": 0.7, "detail_shift": -0.2, "start_percent": 0.2, "end_percent": 0.8},
        "curve": {"quantile": 0.2, "curve": [0.0, 1.0, 3.0]},
        "mask": {"quantile": 0.2, "mask": _mask()},
        "mask, curve, lists": {"quantiles": [0.1, 0.8], "mask": _mask(), "curve": [2.0, 1.0]},
        "lists": {"quantiles": [0.3, 0.5], "detail_shifts": [0.1, -0.1]},
        "smoothest": {"quantile": 0.999, "detail_shift": -1.0},
    }
    inpainting = {**empty, "noise_mask": _mask()}
    inpainting["samples"] = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    found = {}
    for sampler in (None, "euler"):
        for name, inputs in settings.items():
            found[f"{sampler or 'own'}: {name}"] = sample(lambda s=sampler, i=inputs: _guided(s, **i))
        found[f"{sampler or 'own'}: neutral"] = sample(lambda s=sampler: _guided(s))
        found[f"{sampler or 'own'}: inpainting"] = sample(lambda s=sampler: _guided(s, quantile=0.2), inpainting)
        found[f"{sampler or 'own'}: inpainting, mask"] = sample(
            lambda s=sampler: _guided(s, quantile=0.2, mask=_mask().flip(-1)), inpainting
        )
    for sampler in ("heun", "dpmpp_2m", "euler_ancestral", "uni_pc", "dpmpp_2m_sde", "lcm", "euler_cfg_pp"):
        found[f"{sampler}: quantile"] = sample(lambda s=sampler: _guided(s, quantile=0.3))
        if sampler == "uni_pc":  # leaves 0.001 for the 0 of a schedule, and what follows was recorded with that
            sigmas = torch.cat([sigmas[:-1], torch.tensor([0.001])])
    found["model patch: quantile"] = sample(
        lambda: h.core_sampler("heun"),
        patched=lambda: h.kept(_node("DensityGuidanceModel", model=model, **{**_GUIDANCE, "quantile": 0.3})[0]),
    )
    prior = {"quantile": 0.3, "scale": 1.01, "match_quantile": True}
    found["prior scale"] = sample(
        lambda: h.core_sampler("euler"), noise=lambda: _node("PriorGuidanceScale", noise=h.random_noise(), **prior)[0]
    )
    found["prior model"] = sample(
        lambda: h.core_sampler("euler"), patched=lambda: h.kept(_node("PriorGuidanceModel", model=model, **prior)[0])
    )
    for vary in ("fine details", "structure", "custom"):
        found[f"variation: {vary}"] = sample(lambda v=vary: _varied(vary=v, quantile=0.4))
    for correction, probes in (("hutchinson", 2), ("exact", 1)):
        found[f"variation: {correction}"] = sample(lambda c=correction, p=probes: _varied(correction=c, probes=p))
    found["variation: mask, lists, index"] = sample(
        lambda: _varied(quantiles=[0.2, 0.6], variation_index=[3.0, 3.0], mask=_mask())
    )
    found["variation: inpainting"] = sample(lambda: _varied(), inpainting)
    found["exact log-density"] = lambda: _numbers(
        *_node(
            "ExactLogDensity",
            model=model,
            latent={"samples": h.sampled(model, _guided(None, quantile=0.3), sigmas[:-1], empty)},
            sigmas=sigmas[:-1],
        )[0]
    )
    found["log-density"] = lambda: _numbers(
        *_node(
            "LogDensity",
            guider=guider,
            latent={"samples": h.sampled(model, "euler", sigmas, empty)},
            steps=12,
            probes=2,
            seed=3,
            noise_floor=0.2,
        )[0]
    )
    for target, value in (("shift from the unguided run", 0.1), ("bits per dimension", 1.3), ("same for the whole batch", 0.0)):
        found[f"target: {target}"] = sample(lambda t=target, v=value: target_sampler(t, v), schedule=sigmas[:-1])
    for name in (None, "euler", "target"):
        found[f"trace: {name or 'own'}"] = lambda n=name: _trace(guider, n, sigmas)
    for method in ("with score", "without score", "both", "finite scale"):
        found[f"alignment: {method}"] = lambda m=method: _alignment(guider, m, h.schedule(model, 12))
    return found


def _trace(guider, name, sigmas):
    sampler = target_sampler(value=0.1, tolerance=0.01) if name == "target" else _guided(name, quantile=0.3)
    trace = json.loads(
        _node(
            "DensityTrace",
            noise=h.random_noise(),
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=h.empty_latent(size=SIZE),
            exact_trace=True,
        )[3]
    )
    return _numbers(*(v for row in trace["rows"] for key in sorted(row) if isinstance(row[key], list) for v in row[key]))


def _alignment(guider, method, sigmas):
    aligned, cosine, _, _, latent, scale, response = _node(
        "ScoreAlignmentCheck",
        guider=guider,
        noise=h.random_noise(),
        latent_image=h.empty_latent(size=SIZE),
        sigmas=sigmas,
        method=method,
        end_percent=0.95,
        probes=1,
        seed=2,
        detail_shift=0.02,
        scale_step=0.01,
    )
    return torch.cat([_numbers(float(aligned), cosine, scale, *response), latent["samples"].flatten()[::STRIDE].double()])


def _on_networks():
    found = {}
    latents = {"unet": torch.zeros(2, 4, 16, 16), "dit": torch.zeros(2, 16, 8, 8)}
    models = {"unet eps": networks.unet, "unet v": lambda dtype: networks.unet(dtype, "V_PREDICTION"), "dit flow": networks.dit}
    samplers = {
        "own": lambda: _guided(None, quantile=0.3),
        "euler": lambda: _guided("euler", quantile=0.3),
        "variation": lambda: _varied(correction="hutchinson"),
    }
    for kind, make in models.items():
        conditioning = networks.unet_conditioning() if kind.startswith("unet") else networks.dit_conditioning()
        latent = {"samples": latents[kind.split()[0]]}
        for dtype in (torch.float32, torch.bfloat16):
            for name, sampler in samplers.items():

                def run(make=make, dtype=dtype, sampler=sampler, conditioning=conditioning, latent=latent):
                    model = make(dtype)
                    return h.sampled(model, sampler(), h.schedule(model, 6), latent=latent, positive=conditioning)

                found[f"{kind}, {str(dtype).removeprefix('torch.')}, {name}"] = run
    return found


def _with_the_demo_model():
    def demo(sampler):
        model, _, positive, negative, latent = _node("LoadDemoModel", class_name="rock", batch_size=2)
        return h.sampled(
            h.kept(model), sampler(), h.schedule(model, 4), latent=latent, positive=positive, negative=negative, cfg=2.0
        )

    def grid():
        latent, quantiles, indices, levels, columns = _node(
            "VariationGrid", latent=h.empty_latent(1, SIZE), quantiles="0.3, 0.5", variations=3
        )
        return torch.cat(
            [_numbers(*quantiles, *indices, *levels, float(columns)), latent["samples"].flatten()[::STRIDE].double()]
        )

    return {
        "demo model, own": lambda: demo(lambda: _guided(None, quantile=0.3)),
        "demo model, euler": lambda: demo(lambda: _guided("euler", detail_shift=0.1)),
        "variation grid": grid,
        "density levels": lambda: _numbers(*_node("DensityLevels", values="0.1, 0.5, 0.9")[1]),
    }

"""The host's own guidance methods, guiders, caches and conditionings together with the pack's guidance.

    python3 run.py bench composability

Writes docs/composability.json; what a user should know of a method is in docs/composability.md. Under a minute.
"""

from functools import lru_cache

import torch

from ..dg_core.statistics import region_of
from ..testing import host_runs as h
from ..testing import steering, tiny_models
from ..testing.applied import APPLIED, STEERING, Run
from ..testing.host_methods import CFG, METHODS, Method, as_it_is
from .pages import publish
from .tables import OWN

STEPS, QUANTILE = 6, 0.2


@lru_cache
def _built(name):
    return tiny_models.build(name)


def sample(method, run, sigmas=None, latent=None):
    """(samples, what was asked of the model, schedule) of a run with a method."""
    model, seen = h.recording(run.model)
    if sigmas is None:
        sigmas = h.schedule(model, STEPS, denoise=method.denoise)
    if latent is None:
        latent = {"samples": tiny_models.latent(method.family, method.batch)}
        if method.mask or method.denoise < 1:
            latent["samples"] = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(6))
        if method.mask:
            latent["noise_mask"] = inpaint_mask(method)
    conds = method.conditioning(*(tiny_models.conditioning(method.family, seed) for seed in (1, 2)))
    guider = method.guider(model, *conds)
    samples = h.outputs(h.custom.SamplerCustomAdvanced, run.noise, guider, run.sampler, sigmas, latent)[0]["samples"]
    return samples, seen, sigmas


def inpaint_mask(method):
    """Soft, (1, 1, height, width); zero in a part."""
    height, width = tiny_models.FAMILIES[method.family].shape[-2:]
    return (torch.linspace(-0.5, 1, width).clamp(min=0)).expand(1, 1, height, width).contiguous()


def orders(method, node, quantile):
    """{order: `Run`} with the method and the node; both orders where the node patches the model, as the method does."""
    base = Run(h.kept(_built(method.family).clone()), h.core_sampler(method.sampler), h.random_noise())
    first = APPLIED[node].apply(base, quantile)
    runs = {"before": first._replace(model=h.kept(method.patch(first.model)))}
    if first.model is not base.model and method.patch is not as_it_is:
        runs["after"] = APPLIED[node].apply(base._replace(model=h.kept(method.patch(base.model))), quantile)
    return runs


@lru_cache(maxsize=1)
def plain(name):
    method = METHODS[name]
    h.forget_models()
    model = h.kept(method.patch(_built(method.family).clone()))
    return sample(method, Run(model, h.core_sampler(method.sampler), h.random_noise()))


def acts(name):
    """Whether the method, without the pack, changes the result of a run without it."""
    method = METHODS[name]
    if name == "CFG":
        without = Method(
            guider=lambda model, positive, negative: h.core_node("BasicGuider", model=model, conditioning=positive)
        )
    else:
        without = Method(method.family, batch=method.batch)
    run = Run(h.kept(_built(method.family).clone()), h.core_sampler("euler"), h.random_noise())
    return not torch.equal(sample(without, run)[0], plain(name)[0])


def measure(name, node):
    """One method with one node of the pack, in every order: the worst of each.

    neutral: neutral settings leave every bit; finite; same_calls: no further model call; same_method: at the first
    guided step, whose state no guidance has touched yet, the prediction before guidance is the method's own to the bit;
    error: relative, of the change of the final prediction against its definition.
    """
    method = METHODS[name]
    unguided, before, _ = plain(name)
    result = {"neutral": True, "finite": True, "same_calls": True, "same_method": True, "error": 0.0}
    for run in orders(method, node, None).values():
        result["neutral"] &= torch.equal(sample(method, run)[0], unguided)
    for run in orders(method, node, QUANTILE).values():
        guided, seen, sigmas = sample(method, run)
        mask = inpaint_mask(method) if method.mask else None
        region = None if mask is None else region_of(mask)
        error, _ = steering.deviation(run.model, seen, sigmas.tolist(), QUANTILE, region, region)
        result["error"] = max(result["error"], error)
        result["finite"] &= bool(torch.isfinite(guided).all()) and not torch.equal(guided, unguided)
        result["same_calls"] &= seen.calls == before.calls
        start = next(i for i, (a, b) in enumerate(zip(seen.denoised, seen.final)) if not torch.equal(a, b))
        result["same_method"] &= all(torch.equal(a, b) for a, b in zip(seen.denoised[: start + 1], before.final))
    return result


class _Watched:
    """The model that a sampler function of the host gets, with a record of [(x, denoised)]."""

    def __init__(self, model, seen):
        self.inner_model = model.inner_model
        self._model, self._seen = model, seen

    def __call__(self, x, sigma, **kwargs):
        denoised = self._model(x, sigma, **kwargs)
        self._seen.append((x.clone(), denoised.clone()))
        return denoised


def measure_own(name):
    """One method with the pack's own solver, as `measure`, against that solver without guidance.

    neutral: of a mask, a curve and a list of quantiles. same_method: up to the first guided step the solver gets the
    method's own combined prediction (within a mask, the host's blend of it). error: relative, of the change of the next
    state against its definition.
    """
    method = METHODS[name]
    base = Run(h.kept(method.patch(_built(method.family).clone())), None, h.random_noise())
    shape = tiny_models.FAMILIES[method.family].shape

    def run(*args, **more):
        sampler, calls = h.guided_sampler(*args, **more), []
        function = sampler.sampler_function
        sampler.sampler_function = lambda model, *args, **kwargs: function(_Watched(model, calls), *args, **kwargs)
        return *sample(method, base._replace(sampler=sampler)), calls

    plain, before, sigmas, plain_calls = run()
    neutral, *_ = run(mask=torch.rand(1, *shape[-2:]), curve=[1.0, 3.0], quantiles=[0.5])
    guided, seen, _, calls = run(QUANTILE)
    sigmas = sigmas.tolist()
    step = steering.guided_steps(base.model, sigmas)[0]
    mask = inpaint_mask(method) if method.mask else None
    wanted = steering.guided_solver_step(base.model, *calls[step], sigmas, step, QUANTILE, mask).flatten(1)
    change = (calls[step + 1][0].double() - plain_calls[step + 1][0].double()).flatten(1)
    final, got = before.final[step], calls[step][1]
    same = torch.equal(final, got) if mask is None else torch.equal((final - got) * (mask == 1), torch.zeros_like(got))
    return {
        "neutral": torch.equal(neutral, plain),
        "finite": bool(torch.isfinite(guided).all()) and not torch.equal(guided, plain),
        "same_calls": seen.calls == before.calls,
        "same_method": same and all(torch.equal(a, b) for a, b in zip(seen.final[: step + 1], before.final)),
        "error": float(((change - wanted).norm(dim=1) / wanted.norm(dim=1)).max()),
    }


def two_stages():
    """Largest difference between one guided run and the same in two stages, relative to the largest number."""
    worst = 0.0
    for family in ("sd15", "sd3"):
        method = Method(family)
        base = Run(h.kept(_built(family).clone()), h.core_sampler("euler"), h.random_noise())
        for node in STEERING:
            run = APPLIED[node].apply(base, QUANTILE)
            whole, _, sigmas = sample(method, run)
            high, low = h.core_node("SplitSigmas", sigmas=sigmas, step=3)
            half, _, _ = sample(method, run, high)
            rest = run._replace(noise=h.core_node("DisableNoise"))
            result, _, _ = sample(method, rest, low, {"samples": half})
            worst = max(worst, float((result - whole).abs().max() / whole.abs().max()))
    return worst


def main():
    methods = {}
    for name in METHODS:
        methods[name] = {node: measure(name, node) for node in STEERING}
        if METHODS[name].sampler == "euler":
            methods[name][OWN] = measure_own(name)
        print(name, methods[name], flush=True)
    publish(
        "composability",
        {"steps": STEPS, "quantile": QUANTILE, "cfg": CFG, "nodes": STEERING, "methods": methods, "two_stages": two_stages()},
    )

"""The host's own guidance methods, guiders, caches and conditionings together with the pack's guidance.

    python3 run.py bench composability

Writes docs/composability.json and from it docs/composability.md. Under a minute.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
import safetensors.torch
import torch

from ..dg_core.statistics import region_of
from ..launcher.environment import PACK
from ..testing import host_runs as h
from ..testing import steering, tiny_models
from ..testing.ways import STEERING, WAYS, Run

DOCS = PACK / "docs"
STEPS, QUANTILE, CFG = 6, 0.2, 3.0
LORA = "density_guidance_test.safetensors"


def _as_it_is(thing):
    return thing


def _same_conditioning(positive, negative):
    return positive, negative


def _cfg_guider(model, positive, negative):
    return h.core_node("CFGGuider", model=model, positive=positive, negative=negative, cfg=CFG)


@dataclass(frozen=True)
class Method:
    """One method of the host, as it enters a run of a tiny model."""

    note: str  # what a user should know
    family: str = "sd15"
    patch: Callable[[Any], Any] = _as_it_is  # of the model
    conditioning: Callable = _same_conditioning  # (positive, negative) -> the same
    guider: Callable = _cfg_guider  # (model, positive, negative) -> GUIDER
    sampler: str = "euler"
    mask: bool = False  # inpainting
    denoise: float = 1.0
    batch: int = 2  # 1 for methods of the host that cannot do more
    own_state: bool = False  # reuses predictions, so that other states need other calls


def _node(name, **inputs):
    return lambda model: h.core_node(name, model=model, **inputs)


def _dual(style):
    return lambda model, positive, negative: h.core_node(
        "DualCFGGuider", model=model, cond1=positive, cond2=_third("sd15"), negative=negative, cfg_conds=CFG,
        cfg_cond2_negative=2.0, style=style)


def _third(name):
    return tiny_models.conditioning(name, 3)


def _perp_neg(model, positive, negative):
    return h.core_node("PerpNegGuider", model=model, positive=positive, negative=negative,
                       empty_conditioning=_third("sd15"), cfg=CFG, neg_scale=0.7)


def _halves():
    """Two soft masks, (1, height, width), that add up to one."""
    left = torch.linspace(1, 0, 16).expand(1, 16, 16).contiguous()
    return left, 1 - left


def _two_regions(positive, negative):
    parts = [h.core_node("ConditioningSetMask", conditioning=c, mask=m, strength=1.0, set_cond_area="default")
             for c, m in zip((positive, _third("sd15")), _halves())]
    return h.core_node("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1]), negative


def _area(positive, negative):
    part = h.core_node("ConditioningSetArea", conditioning=_third("sd15"), width=64, height=64, x=32, y=0, strength=1.0)
    return h.core_node("ConditioningCombine", conditioning_1=positive, conditioning_2=part), negative


def _timesteps(positive, negative):
    early, late = (h.core_node("ConditioningSetTimestepRange", conditioning=c, start=a, end=b)
                   for c, a, b in ((positive, 0.0, 0.5), (_third("sd15"), 0.5, 1.0)))
    return h.core_node("ConditioningCombine", conditioning_1=early, conditioning_2=late), negative


def _control(positive, negative):
    image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(4))
    return h.core_node("ControlNetApplyAdvanced", positive=positive, negative=negative, strength=1.0, image=image,
                       control_net=_control_net(), start_percent=0.0, end_percent=0.6)


@lru_cache
def _control_net():
    return tiny_models.control_net("sd15")


@lru_cache
def _lora():
    """The name of a LoRA file for sd15, in a folder where the host finds it."""
    folder = Path(tempfile.mkdtemp())
    safetensors.torch.save_file(tiny_models.lora("sd15"), folder / LORA)
    folder_paths.add_model_folder_path("loras", str(folder))
    return LORA


def _hooks(positive, negative):
    hooks = h.core_node("CreateHookLoraModelOnly", lora_name=_lora(), strength_model=1.0)
    return h.core_node("ConditioningSetProperties", cond_NEW=positive, strength=1.0, set_cond_area="default",
                       hooks=hooks), negative


def _merge(model):
    return h.core_node("ModelMergeSimple", model1=model, model2=tiny_models.build("sd15", seed=3), ratio=0.5)


METHODS = {
    "CFG": Method("guidance acts on the combined prediction; the number of bits is then no longer calibrated"),
    "CFG++ (euler_cfg_pp)": Method(
        "the prediction is guided, but these samplers renoise with the unguided one: use a smaller shift",
        sampler="euler_cfg_pp"),
    "Dual CFG, regular": Method("", guider=_dual("regular")),
    "Dual CFG, nested": Method("", guider=_dual("nested")),
    "Perp-Neg": Method("", guider=_perp_neg),
    "RescaleCFG": Method("", patch=_node("RescaleCFG", multiplier=0.7)),
    "CFG-Zero*": Method("", "sd3", patch=_node("CFGZeroStar")),
    "CFGNorm": Method("", "qwen_image", patch=_node("CFGNorm", strength=1.0)),
    "RenormCFG": Method("", "lumina2", patch=_node("RenormCFG", cfg_trunc=100.0, renorm_cfg=1.0), batch=1),
    "APG": Method("", patch=_node("APG", eta=0.5, norm_threshold=5.0, momentum=0.3)),
    "TCFG": Method("", patch=_node("TCFG")),
    "FreSca": Method("", patch=_node("FreSca", scale_low=1.0, scale_high=1.25, freq_cutoff=4)),
    "Mahiro": Method("", patch=_node("Mahiro")),
    "PAG": Method("", patch=_node("PerturbedAttentionGuidance", scale=2.0)),
    "SAG": Method("", patch=_node("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0)),
    "Skip-layer guidance (SD3)": Method("", "sd3", patch=_node(
        "SkipLayerGuidanceSD3", layers="0", scale=2.0, start_percent=0.0, end_percent=0.7)),
    "Skip-layer guidance (DiT)": Method("", "chroma", patch=_node(
        "SkipLayerGuidanceDiT", double_layers="0", single_layers="0", scale=2.0, start_percent=0.0, end_percent=0.7,
        rescaling_scale=0.0)),
    "Skip-layer guidance (simple)": Method("", "chroma", patch=_node(
        "SkipLayerGuidanceDiTSimple", double_layers="0", single_layers="0", start_percent=0.0, end_percent=0.7)),
    "Epsilon Scaling": Method(
        "does a similar thing, so the amounts add up; it is wrong on flow models (warned in the log)",
        patch=_node("Epsilon Scaling", scaling_factor=1.005)),
    "Temporal Score Rescaling": Method(
        "does a similar thing, so the amounts add up (warned in the log)", "sd3",
        patch=_node("TemporalScoreRescaling", tsr_k=0.95, tsr_sigma=1.0), batch=1),
    "Linear CFG of video frames": Method("", "svd", patch=_node("VideoLinearCFGGuidance", min_cfg=1.0)),
    "Model sampling: SD3 shift": Method("the patched schedule counts", "sd3",
                                        patch=_node("ModelSamplingSD3", shift=6.0)),
    "Model sampling: v, zsnr": Method("", "sd2",
                                      patch=_node("ModelSamplingDiscrete", sampling="v_prediction", zsnr=True)),
    "Prompt from a step to a step": Method("", conditioning=_timesteps),
    "Regional prompts: masks": Method("", conditioning=_two_regions),
    "Regional prompts: areas": Method("", conditioning=_area),
    "ControlNet": Method("", conditioning=_control),
    "LoRA": Method("", patch=lambda model: h.core_node(
        "LoraLoaderModelOnly", model=model, lora_name=_lora(), strength_model=1.0)),
    "LoRA by hooks": Method("", conditioning=_hooks),
    "Model merging": Method("", patch=_merge),
    "FreeU": Method("", patch=_node("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2)),
    "HyperTile": Method("", patch=_node("HyperTile", tile_size=64, swap_size=2, max_depth=0, scale_depth=False)),
    "Inpainting": Method("D and norms count the masked region only", mask=True),
    "Differential Diffusion": Method(
        "D and norms count everything where the mask is above zero", patch=_node("DifferentialDiffusion", strength=1.0),
        mask=True),
    "Context windows": Method("D is that of the whole video", "wan21", patch=_node(
        "WanContextWindowsManual", context_length=5, context_overlap=1, context_schedule="standard_static",
        context_stride=1, closed_loop=False, fuse_method="pyramid"), batch=1),
    "EasyCache": Method("what is reused is unguided, and guided afresh", "wan21", patch=_node(
        "EasyCache", reuse_threshold=3.0, start_percent=0.1, end_percent=0.95, verbose=False), own_state=True),
    "LazyCache": Method("what is reused is unguided, and guided afresh", "wan21", patch=_node(
        "LazyCache", reuse_threshold=3.0, start_percent=0.1, end_percent=0.95, verbose=False), own_state=True),
    "torch.compile": Method("what the node compiles is the network; guidance stays outside of it", "stable_audio",
                            patch=_node("TorchCompileModel", backend="inductor")),
    "Image to image": Method("a shift is reached within the part of the schedule that runs", denoise=0.5),
}
COMPILED = "torch.compile"  # needs a C++ compiler
OWN = "own solver"
TWO_STAGES = "two stages by SplitSigmas"


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
    first = WAYS[node].apply(base, quantile)
    runs = {"before": first._replace(model=h.kept(method.patch(first.model)))}
    if first.model is not base.model and method.patch is not _as_it_is:
        runs["after"] = WAYS[node].apply(base._replace(model=h.kept(method.patch(base.model))), quantile)
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
        without = Method("", guider=lambda model, positive, negative: h.core_node(
            "BasicGuider", model=model, conditioning=positive))
    else:
        without = Method("", method.family, batch=method.batch)
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
        result["same_method"] &= all(torch.equal(a, b) for a, b in zip(seen.denoised[:start + 1], before.final))
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
        "same_method": same and all(torch.equal(a, b) for a, b in zip(seen.final[:step + 1], before.final)),
        "error": float(((change - wanted).norm(dim=1) / wanted.norm(dim=1)).max()),
    }


def two_stages():
    """Largest difference between one guided run and the same in two stages, relative to the largest number."""
    worst = 0.0
    for family in ("sd15", "sd3"):
        method = Method("", family)
        base = Run(h.kept(_built(family).clone()), h.core_sampler("euler"), h.random_noise())
        for node in STEERING:
            run = WAYS[node].apply(base, QUANTILE)
            whole, _, sigmas = sample(method, run)
            high, low = h.core_node("SplitSigmas", sigmas=sigmas, step=3)
            half, _, _ = sample(method, run, high)
            rest = run._replace(noise=h.core_node("DisableNoise"))
            result, _, _ = sample(method, rest, low, {"samples": half})
            worst = max(worst, float((result - whole).abs().max() / whole.abs().max()))
    return worst


def page(results):
    lines = [f"| method | tried on | largest relative error | {OWN} | what to know |", "|---|---|---|---|---|"]
    for name, by_node in results["methods"].items():
        method = METHODS[name]
        cells = []
        for found in ([r for node, r in by_node.items() if node != OWN], [by_node[OWN]] if OWN in by_node else []):
            works = all(v for r in found for k, v in r.items()
                        if k != "error" and (k != "same_calls" or not method.own_state))
            cells.append("" if not found else f"{max(r['error'] for r in found):.0e}" if works else "fails")
        lines.append(f"| {name} | {tiny_models.FAMILIES[method.family].title} | {' | '.join(cells)} | {method.note} |")
    return f"""# Together with ComfyUI's own methods

Made by `python3 run.py bench composability` from [composability.json](composability.json), inside ComfyUI, \
with tiny models of
random weights, {results["steps"]} steps, CFG {results["cfg"]:g} and quantile {results["quantile"]:g}, with
{" and ".join(results["nodes"])}; where both the method and the node patch the model, in both orders.

For each method: neutral settings leave every bit of its result; guidance needs no further model call; \
the prediction that
guidance starts from is the method's own, to the bit; and what the sampler gets is that prediction, guided. \
The number is the
largest error of that change against its definition, \
`denoised - (sigma / alpha) (eta - 1) eps` with eps of the final prediction.
The column "{OWN}" is about DensityGuidanceSampler with no sampler connected: its neutral settings leave every bit of what it
does without guidance, and its number is the error of the first guided step.

{chr(10).join(lines)}

One run, and the same in {TWO_STAGES} (guided in both), differ by {results["two_stages"]:.0e} of the largest number.
EasyCache and LazyCache decide by the state what to reuse, so a guided run may call the model at other steps.

Not tried, because ComfyUI 0.3.75 has no node for it: NAG, and CFG limited to an interval.

Unsampling (FlipSigmas) adds noise, and is refused: use the sampler without guidance for it, \
and guide the sampling after it.
"""


def main():
    methods = {}
    for name in METHODS:
        methods[name] = {node: measure(name, node) for node in STEERING}
        if METHODS[name].sampler == "euler":
            methods[name][OWN] = measure_own(name)
        print(name, methods[name], flush=True)
    results = {"steps": STEPS, "quantile": QUANTILE, "cfg": CFG, "nodes": STEERING, "methods": methods,
               "two_stages": two_stages()}
    (DOCS / "composability.json").write_text(json.dumps(results, indent=1) + "\n")
    (DOCS / "composability.md").write_text(page(results))

"""Density guidance inside the real host, on the model whose density is known."""

import math
import time
from functools import lru_cache

import comfy.samplers
import numpy as np
import pytest
import torch
from comfy_extras.nodes_model_advanced import RescaleCFG
from density_guidance.nodes import PriorGuidanceScale
from density_guidance.nodes.builtin import exact
from density_guidance.testing import host_runs as h
from density_guidance.testing import steering, tiny_models

# One of every kind of sampler; tests/test_samplers.py has them all, on a network that costs nothing. A single call per step,
# two calls, ancestral, SDE, CFG++, multistep, uni_pc, steps of its own choice, and the pack's own.
EACH_KIND = ["euler", "heun", "euler_ancestral", "dpmpp_2m_sde", "euler_cfg_pp", "dpmpp_2m", "uni_pc", "dpm_adaptive", None]
KINDS = pytest.mark.parametrize("prediction", h.KINDS)
OWN_AND_EULER = pytest.mark.parametrize("sampler", [None, "euler"], ids=["own", "euler"])
DIM = 3 * h.SIZE**2


@lru_cache
def run(prediction, name, quantile=None, detail_shift=0.0, window=(0.0, 1.0)):
    """(samples, model calls) at 6 steps; quantile None: the host's sampler by itself."""
    model, seen = h.recording(h.exact_model(prediction))
    sampler = name if quantile is None else h.guided_sampler(quantile, detail_shift, *window, sampler=name)
    return h.sampled(model, sampler, h.schedule(model, 6)), seen.calls


def alpha_of(prediction, sigma):
    return 1 - sigma if prediction == "flow" else 1.0


def assert_close(a, b, relative):
    """Largest difference, relative to the largest number of each image."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    error = ((a - b).abs().amax(1) / b.abs().amax(1)).max().item()
    assert error <= relative, f"relative error {error:.2e}, allowed {relative:.1e}"


# --- neutral and guided ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prediction, name",
    [(h.KINDS[i % 2], name) for i, name in enumerate(EACH_KIND)]
    + [("flow", "dpm_adaptive"), ("eps", "uni_pc"), ("flow", None)],
)
def test_each_kind_of_sampler(prediction, name):
    """Neutral to the bit, also with a window between two sigmas; guided: finite, reproducible, no extra model call."""
    plain, calls = run(prediction, name) if name else run(prediction, None, 0.5)
    assert torch.isfinite(plain).all() and (name or calls == 6)
    for settings in ((0.5, 0.0), (0.2, 1.0, (0.001, 0.002))):
        neutral, neutral_calls = run(prediction, name, *settings)
        assert torch.equal(neutral, plain) and neutral_calls == calls
    for settings in ((0.3, 0.0), (0.5, 0.5)):
        guided, guided_calls = run(prediction, name, *settings)
        assert torch.isfinite(guided).all() and not torch.equal(guided, plain)
        assert guided_calls == calls or name == "dpm_adaptive"  # chooses its own steps from the error that it sees
    model = h.exact_model(prediction)
    again = h.sampled(model, h.guided_sampler(0.5, 0.5, sampler=name), h.schedule(model, 6))
    assert torch.equal(again, guided)


@pytest.mark.parametrize("settings", [(0.5, 0.0), (0.2, 1.0, 0.001, 0.002)], ids=["neutral", "empty range"])
def test_neutral_hangs_nothing_into_the_host(settings):
    """Without guidance the host sees the model options that it would see anyway, and no tensor of ours."""

    def hooks(model, sampler):
        model, seen = h.recording(model)
        h.sample(model, sampler, h.schedule(model, 3))
        wrappers = seen.options[0]["transformer_options"]["wrappers"]
        per_point = {point: sum(map(len, keys.values())) for point, keys in wrappers.items()}
        return len(seen.options[0].get("sampler_post_cfg_function", ())), {
            k: n for k, n in per_point.items() if k != "sampler_sample"
        }

    model = h.exact_model("flow")
    plain = hooks(model, "euler")
    assert plain == (0, {"apply_model": 1, "outer_sample": 1, "predict_noise": 1})  # the recorder's
    assert hooks(model, h.guided_sampler(*settings, sampler="euler")) == plain
    assert hooks(h.guided_model(model, *settings), "euler") == plain
    assert hooks(model, h.guided_sampler(0.2, sampler="euler"))[1]["predict_noise"] == 2  # the comparison can tell


@OWN_AND_EULER
def test_a_guider_that_is_used_again_is_as_new(sampler):
    """In a graph of several stages one GUIDER serves several samplers: none leaves anything in it."""
    model = h.exact_model("flow")
    guider = h.outputs(h.custom.BasicGuider, model, h.conditioning())[0]
    schedule, options = h.schedule(model, 4), repr(guider.model_options)

    def run(quantile):
        guided = h.guided_sampler(quantile, sampler=sampler)
        samples = h.outputs(h.custom.SamplerCustomAdvanced, h.random_noise(), guider, guided, schedule, h.empty_latent())
        assert repr(guider.model_options) == options
        return samples[0]["samples"]

    plain, guided = run(0.5), run(0.2)
    assert torch.equal(run(0.5), plain) and torch.equal(run(0.2), guided) and not torch.equal(guided, plain)


@KINDS
@pytest.mark.parametrize("settings", [(0.3, 0.0), (0.5, 0.5), (0.7, -0.3, 0.2, 0.7), (0.05, 0.2, 0.0, 0.5)], ids=str)
def test_euler_is_the_closed_form_scheme(prediction, settings):
    """Each step of the host's Euler: x' = x + (sigma' - sigma) (x - x0~) / sigma, in VE y' = y + (s' - s) eta eps."""
    model, seen = h.recording(h.exact_model(prediction))
    schedule = h.schedule(model, 12)
    result = h.sampled(model, h.guided_sampler(*settings, sampler="euler"), schedule)
    sigmas = schedule.double().tolist()
    pushed = lambda dim: steering.push(model, sigmas, dim, *settings)
    guided = steering.guided_steps(model, sigmas, *settings[2:])
    assert guided and sigmas[-1] == 0 and len(seen.x) == 12
    for i, (x, denoised) in enumerate(zip(seen.x, seen.denoised)):
        target = steering.steered(model, x, denoised, sigmas[i], pushed) if i in guided else denoised.double()
        expected = x + (sigmas[i + 1] - sigmas[i]) * (x - target) / sigmas[i]
        if i < 11:
            assert_close(seen.x[i + 1], expected, 1e-6)
        else:
            assert_close(result, model.model.process_latent_out(expected), 1e-6)
    # The last step to zero is unguided, and so is the call at sigma = 1 of a flow model.
    assert 11 not in guided and (0 not in guided or prediction != "flow")


# --- the model patch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction, name", [("eps", "euler"), ("flow", "heun"), ("eps", "dpmpp_2m_sde"), ("flow", "lms")])
def test_model_patch_in_ksampler_equals_the_wrapped_sampler(prediction, name):
    model = h.exact_model(prediction)
    assert h.guided_model(model) is model  # neutral settings patch nothing
    patched = h.guided_model(model, 0.3, 0.2, 0.1, 0.9)
    expected, _ = run(prediction, name, 0.3, 0.2, (0.1, 0.9))
    assert torch.equal(h.ksampler(patched, name), expected)
    assert torch.equal(h.ksampler(model, name), run(prediction, name)[0])  # and leaves the model alone


@KINDS
@pytest.mark.parametrize("as_patch", [True, False], ids=["model", "sampler"])
def test_guidance_is_last_and_sees_the_combined_prediction(prediction, as_patch):
    """CFG between two components, a rescaling and a later post-CFG patch: guidance acts on what they left."""
    model = h.exact_model(prediction)
    if as_patch:
        model = h.guided_model(model, 0.2)
    model = RescaleCFG().patch(model, 0.7)[0]
    model.set_model_sampler_post_cfg_function(lambda args: 0.9 * args["denoised"])
    model, seen = h.recording(model)
    sampler, schedule = "euler" if as_patch else h.guided_sampler(0.2, sampler="euler"), h.schedule(model, 6)
    h.sample(model, sampler, schedule, positive=h.conditioning(component=3), negative=h.conditioning(component=40), cfg=3.0)
    assert steering.deviation(model, seen, schedule.tolist(), 0.2)[0] < 1e-3


@KINDS
def test_cfg_prediction_is_guided_as_a_whole(prediction):
    model, seen = h.recording(h.exact_model(prediction))
    schedule = h.schedule(model, 4)
    conds = [h.conditioning(component=k) for k in (3, 40)]
    h.sample(model, h.guided_sampler(0.2, sampler="euler"), schedule, positive=conds[0], negative=conds[1], cfg=3.0)
    sigmas = schedule.double().tolist()
    assert steering.deviation(model, seen, sigmas, 0.2)[0] < 1e-3
    density = model.model.density
    for x, sigma, combined in list(zip(seen.x, sigmas, seen.denoised))[1:]:
        alpha = alpha_of(prediction, sigma)
        cond, uncond = (density.denoised(x.double() / alpha, sigma / alpha, density.one_hot(k)) for k in (3, 40))
        assert_close(combined, uncond + 3 * (cond - uncond), 1e-5)


# --- previews ----------------------------------------------------------------------------------------------------


def previews(prediction, sampler, latent=None, mask=None):
    """(model, result, what the callback got at each step, what was seen) of a run of 6 steps through the guider."""
    model, seen = h.recording(h.exact_model(prediction))
    shown = []
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(h.conditioning(), h.conditioning())
    latent = h.empty_latent()["samples"] if latent is None else latent
    noise = h.random_noise().generate_noise({"samples": latent})
    with torch.inference_mode():
        result = guider.sample(
            noise,
            latent,
            sampler,
            h.schedule(model, 6),
            mask,
            lambda i, x0, x, n: shown.append((i, x0.clone(), n)),
            True,
            h.SEED,
        )
    return model, result, shown, seen


@pytest.mark.parametrize("prediction, name", [(h.KINDS[(i + 1) % 2], name) for i, name in enumerate(EACH_KIND)])
def test_previews_show_the_unguided_prediction(prediction, name):
    """Everything that the callback shows is a prediction of the model from before the guidance."""
    _, _, shown, seen = previews(prediction, h.guided_sampler(0.05, sampler=name))
    _, _, plain, unguided = previews(prediction, h.guided_sampler(0.5, sampler=name))
    assert name == "dpm_adaptive" or [(i, n) for i, _, n in shown] == [(i, n) for i, _, n in plain]
    reports_a_prediction = all(any(torch.equal(x0, d) for d in unguided.denoised) for _, x0, _ in plain)
    for _, x0, _ in shown:
        assert torch.isfinite(x0).all()
        if reports_a_prediction:
            nearest = min(seen.denoised, key=lambda d: (d - x0).abs().max())
            assert_close(x0, nearest, 1e-6)


@pytest.mark.parametrize(
    "prediction, name", [("flow", None), ("eps", "euler"), ("flow", "dpmpp_2m"), ("eps", "res_multistep"), ("flow", "er_sde")]
)
def test_preview_of_each_step_is_its_own_prediction(prediction, name):
    model, result, shown, seen = previews(prediction, h.guided_sampler(0.05, sampler=name))
    assert [i for i, _, _ in shown] == list(range(6))
    assert all(torch.equal(x0, denoised) for (_, x0, _), denoised in zip(shown, seen.denoised))
    if name is not None:
        assert_close(result, model.model.process_latent_out(shown[-1][1]), 1e-6)


@KINDS
@OWN_AND_EULER
def test_denoised_output_is_unguided(prediction, sampler):
    model, seen = h.recording(h.exact_model(prediction))
    guided = h.guided_sampler(0.05, sampler=sampler)
    out, denoised = h.sample(model, guided, h.schedule(model, 6)[:-1])
    assert torch.equal(denoised["samples"], model.model.process_latent_out(seen.denoised[-1]))
    assert not torch.equal(seen.final[-1], seen.denoised[-1]) or sampler is None
    out, denoised = h.sample(model, guided, h.schedule(model, 20))
    assert_close(out["samples"], denoised["samples"], 1e-6 if sampler else 1e-2)


# --- inpainting --------------------------------------------------------------------------------------------------


def inpaint_latent(soft=False):
    """Two images, each with a mask of its own."""
    mask = h.two_masks()
    if soft:
        mask = torch.nn.functional.avg_pool2d(mask, 5, 1, 2)
    return {"samples": run("flow", "euler")[0], "noise_mask": mask}


@pytest.mark.parametrize("prediction, name", [("eps", "euler"), ("flow", "dpmpp_2m"), ("flow", "heun"), ("eps", "ddim")])
def test_inpainting_keeps_what_is_outside_the_mask(prediction, name):
    model, latent = h.exact_model(prediction), inpaint_latent()
    schedule = h.schedule(model, 6)
    plain = h.sampled(model, name, schedule, latent)
    guided = h.sampled(model, h.guided_sampler(0.1, sampler=name), schedule, latent)
    outside = (latent["noise_mask"] == 0).expand_as(plain)
    assert torch.equal(guided[outside], plain[outside])
    assert not torch.equal(guided[~outside], plain[~outside])


@KINDS
@pytest.mark.parametrize("quantile", [0.5, 0.1])
def test_own_solver_returns_the_original_outside_the_mask(prediction, quantile):
    model, latent = h.exact_model(prediction), inpaint_latent()
    result = h.sampled(model, h.guided_sampler(quantile), h.schedule(model, 6), latent)
    outside = (latent["noise_mask"] == 0).expand_as(result)
    through_the_host = model.model.process_latent_out(model.model.process_latent_in(latent["samples"]))
    assert torch.equal(result[outside], through_the_host[outside])
    assert not torch.allclose(result[~outside], latent["samples"][~outside], atol=1e-3)


@KINDS
@pytest.mark.parametrize("detail_shift", [0.0, 0.4])
def test_inpainting_takes_its_statistics_from_the_masked_region(prediction, detail_shift):
    model, seen = h.recording(h.exact_model(prediction))
    latent, schedule = inpaint_latent(), h.schedule(model, 6)
    h.sample(model, h.guided_sampler(0.2, detail_shift, sampler="euler"), schedule, latent)
    mask = latent["noise_mask"]
    assert steering.deviation(model, seen, schedule.tolist(), 0.2, mask, mask, detail_shift=detail_shift)[0] < 1e-3


@pytest.mark.parametrize("prediction, soft", [("eps", False), ("flow", True)], ids=["hard", "soft"])
def test_inpainting_previews_are_unguided(prediction, soft):
    """The preview is the host's blend of the unguided prediction with the original."""
    latent = inpaint_latent(soft)
    mask = latent["noise_mask"]
    model, _, shown, seen = previews(prediction, h.guided_sampler(0.05, sampler="euler"), latent["samples"], mask)
    original = model.model.process_latent_in(latent["samples"])
    for (_, x0, _), denoised in zip(shown, seen.denoised):
        assert_close(x0, denoised * mask + original * (1 - mask), 1e-6)


# --- batches, schedules, shapes, dtypes --------------------------------------------------------------------------


@pytest.mark.parametrize("prediction, name", [("eps", None), ("flow", "euler"), ("eps", "dpmpp_2m")])
def test_an_image_does_not_depend_on_its_batch(prediction, name):
    model = h.exact_model(prediction)
    sampler, schedule = h.guided_sampler(0.2, 0.3, sampler=name), h.schedule(model, 8)[:-1]

    def batch(indices):
        return h.sampled(model, sampler, schedule, {**h.empty_latent(len(indices)), "batch_index": indices})

    together = batch([0, 1, 2])
    for i in range(3):
        assert_close(batch([i]), together[i : i + 1], 5e-6)


IMAGES = [(0.1, 0.0), (0.5, 0.0), (0.5, 0.4), (0.999, -0.6)]  # the last one runs into the peak of the density


@pytest.mark.parametrize(
    "prediction, name, masked",
    [
        ("eps", None, False),
        ("flow", None, True),
        ("flow", "euler", False),
        ("eps", "euler", True),
        ("eps", "dpmpp_2m", False),
        ("flow", "dpmpp_2m", True),
        ("flow", "patch", False),
        ("eps", "patch", True),
    ],
)
def test_each_image_of_a_batch_has_settings_of_its_own(prediction, name, masked):
    """To the last bit the images of a run in which all have those settings; a neutral one is the unguided image."""
    model = h.exact_model(prediction)
    schedule = h.schedule(model, 4)
    latent = h.empty_latent(4)
    if masked:
        latent["noise_mask"] = inpaint_latent(soft=True)["noise_mask"].repeat(2, 1, 1, 1)
        latent["noise_mask"][2:, :, 3:9] = 1

    def images(*settings, **lists):
        if name == "patch":
            return h.sampled(h.guided_model(model, *settings, **lists), "euler", schedule, latent)
        return h.sampled(model, h.guided_sampler(*settings, sampler=name, **lists), schedule, latent)

    quantiles, detail_shifts = zip(*IMAGES)
    together = images(quantiles=list(quantiles), detail_shifts=list(detail_shifts))
    singles = [images(*settings) for settings in IMAGES]
    for i, single in enumerate(singles):
        assert torch.equal(together[i], single[i])
    plain = h.sampled(model, "euler" if name == "patch" else name or h.guided_sampler(), schedule, latent)
    assert torch.equal(together[1], plain[1]) and not torch.equal(together[0], plain[0])
    assert torch.equal(images(0.9, 0.9, quantiles=[0.1], detail_shifts=[0.0]), singles[0])
    assert torch.equal(images(0.5, 0.4, quantiles=[0.5] * 4), singles[2])


@OWN_AND_EULER
def test_a_sweep_in_one_batch_is_faster_than_its_images_one_by_one(sampler):
    """The same images in less than half of the time of this thread, on a network whose calls cost more than its pixels."""
    model = h.kept(tiny_models.build("flux"))
    schedule, count = h.schedule(model, 8), 8
    quantiles = torch.linspace(0.1, 0.9, count).tolist()

    def images(indices, **settings):
        latent = {"samples": tiny_models.latent("flux", len(indices)), "batch_index": indices}
        guided = h.guided_sampler(sampler=sampler, **settings)
        return h.sampled(model, guided, schedule, latent, positive=tiny_models.conditioning("flux", 1))

    ways = {
        "together": lambda: images(list(range(count)), quantiles=quantiles),
        "alone": lambda: torch.cat([images([i], quantile=q) for i, q in enumerate(quantiles)]),
    }
    assert torch.allclose(ways["together"](), ways["alone"](), atol=1e-4)
    best = dict.fromkeys(ways, math.inf)
    for way, run in [*ways.items()] * 3:
        start = time.thread_time()
        run()
        best[way] = min(best[way], time.thread_time() - start)
    print(f"{sampler}: {best['alone'] / best['together']:.2f} times as fast")
    assert best["alone"] > 2 * best["together"]


@pytest.mark.parametrize("name", [None, "euler", "dpmpp_sde"])
def test_neutral_lists_are_the_wrapped_sampler_bit_for_bit(name):
    lists = {"quantiles": [0.5, 0.5], "detail_shifts": [0.0]}
    plain, calls = run("flow", name) if name else run("flow", None, 0.5)
    model, seen = h.recording(h.exact_model("flow"))
    assert torch.equal(h.sampled(model, h.guided_sampler(0.1, 1.0, sampler=name, **lists), h.schedule(model, 6)), plain)
    assert seen.calls == calls
    assert h.guided_model(model, 0.1, 1.0, **lists) is model


@KINDS
@OWN_AND_EULER
def test_schedules_at_their_limits(prediction, sampler):
    """Repeated sigmas, a single step to zero, a single sigma, and none."""
    model, seen = h.recording(h.exact_model(prediction))
    guided, schedule = h.guided_sampler(0.2, 0.3, sampler=sampler), h.schedule(model, 6)
    repeated = schedule.repeat_interleave(torch.tensor([1, 2, 1, 3, 1, 2, 1]))
    assert_close(h.sampled(model, guided, repeated), h.sampled(model, guided, schedule), 2e-6)
    # Nothing is left to steer in one step to zero: it equals the host's Euler; the own solver returns the prediction itself.
    schedule = h.schedule(model, 1)
    seen.denoised.clear()
    result, plain = (h.sampled(model, s, schedule) for s in (guided, "euler"))
    assert torch.equal(result, plain if sampler else model.model.process_latent_out(seen.denoised[0]))
    assert_close(result, plain, 1e-5)
    seen.calls = 0
    assert torch.equal(h.sampled(model, guided, torch.tensor([0.7])), h.sampled(model, "euler", torch.tensor([0.7])))
    latent = {"samples": run("flow", "euler")[0]}
    assert torch.equal(h.sampled(model, guided, torch.tensor([]), latent), latent["samples"]) and seen.calls == 0


@KINDS
@OWN_AND_EULER
@pytest.mark.parametrize("stretch", [slice(0, 4), slice(3, None), slice(2, 5)], ids=["end above 0", "img2img", "middle"])
def test_part_of_a_schedule(prediction, sampler, stretch):
    """Below the first sigma and above zero: guidance acts, and neutral equals unguided."""
    model, latent = h.exact_model(prediction), {"samples": run("flow", "euler")[0]}
    schedule = h.schedule(model, 8)[stretch]
    neutral, more, less = (h.sampled(model, h.guided_sampler(q, sampler=sampler), schedule, latent) for q in (0.5, 0.1, 0.9))
    assert torch.isfinite(more).all() and torch.isfinite(less).all()
    s = float(schedule[-1] if schedule[-1] > 0 else schedule[-2])
    density, inside = model.model.density, model.model.process_latent_in
    bits = torch.stack([density.bits_per_dim(inside(x.double()), s / alpha_of(prediction, s)) for x in (more, neutral, less)])
    if schedule[-1] > 0:
        assert (bits.diff(dim=0) < 0).all()
    assert not torch.equal(more, neutral)


@KINDS
@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_own_solver_on_every_scheduler(prediction, scheduler):
    model = h.exact_model(prediction)
    for steps in (1, 2, 5):
        if scheduler in ("kl_optimal", "linear_quadratic") and steps < 3:
            continue  # the host's scheduler divides by zero there
        schedule = h.schedule(model, steps, scheduler)
        guided = h.sampled(model, h.guided_sampler(0.3), schedule)
        assert torch.isfinite(guided).all()
        moved = not torch.equal(guided, h.sampled(model, h.guided_sampler(0.5), schedule))
        assert moved == bool(steering.guided_steps(model, schedule.tolist()))


@pytest.mark.parametrize("shape", [(2, 16, 3, 8, 8), (1, 8, 40), (2, 4, 8, 8)], ids=["5-D", "3-D", "4-D"])
def test_latents_of_any_dimension(shape):
    """Video, audio and image latents: Euler meets the recursion written out, for D of one image."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    model = h.free_model("FLOW", h.half)
    schedule = h.schedule(model, 8)
    sigmas = schedule.double().tolist()
    x = noise.double()
    for i in range(8):
        target = x / 2
        if i in steering.guided_steps(model, sigmas):
            target = steering.steered(model, x, target, sigmas[i], lambda dim: steering.push(model, sigmas, dim, 0.2, 0.3))
        x = x + (sigmas[i + 1] - sigmas[i]) * (x - target) / sigmas[i]
    result = h.free_run(model, h.guided_sampler(0.2, 0.3, sampler="euler"), schedule, noise)
    assert_close(result, x, 1e-5)
    own = h.free_run(model, h.guided_sampler(0.2, 0.3), schedule, noise)
    assert own.shape == noise.shape and torch.isfinite(own).all()
    assert not torch.equal(own, h.free_run(model, h.guided_sampler(0.5), schedule, noise))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("quantile", [0.3, 0.7])
def test_narrow_latents_are_guided_in_float32(dtype, quantile):
    """eta - 1 is 0.0014 here: in bfloat16 eta would round to 1, and the squared norm overflows float16."""
    # At CFG 1 the host divides zero by 1e-37 for the missing negative, which float16 cannot hold: so CFG 2.
    noise = torch.randn(1, 16, 128, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    model, seen = h.recording(h.free_model("FLOW", h.half))
    sigmas = [0.9375, 0.75, 0.5, 0.25, 0.125, 0.0]  # exact in every dtype
    result = h.free_run(model, h.guided_sampler(quantile, sampler="euler"), torch.tensor(sigmas), noise, cfg=2.0)
    assert torch.isfinite(result).all() and seen.x[0].dtype in (dtype, torch.float32)  # to which newer hosts widen
    pushed = lambda dim: steering.push(model, sigmas, dim, quantile)
    for i in steering.guided_steps(model, sigmas):
        expected = steering.steered(model, seen.x[i], seen.denoised[i], sigmas[i], pushed)
        change, wanted = ((v - seen.denoised[i].double()).flatten() for v in (seen.final[i], expected))
        error = (seen.final[i].double() - expected).abs()
        assert (error <= 1.01 * torch.finfo(dtype).eps * expected.abs() + 1e-6).all()
        slope = float(change @ wanted / wanted.square().sum())
        assert abs(slope - 1) < (0.001 if dtype == torch.float32 else 0.02), (i, slope)
    own = h.free_run(model, h.guided_sampler(quantile), torch.tensor(sigmas), noise, cfg=2.0)
    assert torch.isfinite(own).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("steps", range(4, 24, 3))
def test_rounded_sigmas_leave_the_guided_steps_alone(dtype, steps):
    """A sampler on narrow latents reports rounded sigmas; the same steps are guided as in float32."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    model, seen = h.recording(h.free_model("FLOW", h.half))
    schedule = h.schedule(model, steps)
    h.free_run(model, h.guided_sampler(0.05, sampler="euler"), schedule, noise, cfg=2.0)
    acted = [i for i, (a, b) in enumerate(zip(seen.denoised, seen.final)) if not torch.equal(a, b)]
    assert acted == steering.guided_steps(model, schedule.tolist())


# --- what it is for ----------------------------------------------------------------------------------------------


@KINDS
def test_mixture_follows_the_quantile(prediction):
    """More detail at lower quantiles, in exact bits per dimension, for at least 90% of 16 seeds; docs/detail_shift.md: 64."""
    model = h.exact_model(prediction)
    noise = h.outputs(PriorGuidanceScale, h.random_noise(100), 0.5, 1.0, True)[0]
    schedule = h.schedule(model, 20)[:-1]
    bits = []
    for quantile in (0.05, 0.3, 0.5, 0.7, 0.95):
        samples = h.sampled(model, h.guided_sampler(quantile), schedule, h.empty_latent(16), noise=noise)
        bits.append(exact.read(model, samples, schedule))
    falling = (np.diff(bits, axis=0) < 0).all(axis=0)
    assert falling.mean() >= 0.9, f"{falling.sum()} of 16 seeds"

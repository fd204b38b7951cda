"""Work inside a guider's sampling call: what the model sees, what comes back, and what stops it."""

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from density_guidance.dg_core import divergence
from density_guidance.nodes import PriorGuidanceModel
from density_guidance.nodes.host import model_access
from density_guidance.testing import host_runs as h
from density_guidance.testing import networks


def basic(model, positive):
    return h.outputs(h.custom.BasicGuider, model, positive)[0]


def cfg(model, positive, negative):
    return h.outputs(h.custom.CFGGuider, model, positive, negative, 2.5)[0]


def dual(model, one, two, negative):
    return h.outputs(h.custom.DualCFGGuider, model, one, two, negative, 2.0, 1.5, "regular")[0]


def run(guider, function, latent, calls=1):
    with torch.inference_mode():
        return model_access.run_in_guider(guider, latent, function, calls, [1.0])


def latent(batch=3, channels=4):
    return torch.randn(batch, channels, 16, 16, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "make",
    [
        lambda m: basic(m, networks.unet_conditioning(1)),
        lambda m: cfg(m, networks.unet_conditioning(1), networks.unet_conditioning(2)),
        lambda m: dual(m, *map(networks.unet_conditioning, (1, 2, 3))),
    ],
    ids=["BasicGuider", "CFGGuider", "DualCFGGuider"],
)
def test_the_model_is_the_one_that_samplers_get(make):
    """One Euler step of the host at sigma = 1 returns denoised; so does the run."""
    model = networks.unet()
    x = latent()
    with torch.inference_mode():
        wanted = make(model).sample(x, torch.zeros_like(x), h.core_sampler("euler"), torch.tensor([1.0, 0.0]), seed=0)
    scale = model.model.latent_format.scale_factor
    found = run(make(model), lambda m: m.predict(m.x / scale, 1.0), x)
    torch.testing.assert_close(found / scale, wanted, rtol=1e-3, atol=1e-4)


def test_the_latent_arrives_in_the_models_space():
    model = h.exact_model("flow")
    images = torch.rand(2, 3, h.SIZE, h.SIZE, generator=torch.Generator().manual_seed(0))
    x = run(basic(model, h.conditioning()), lambda m: m.x, images)
    torch.testing.assert_close(x, model.model.process_latent_in(images))
    assert not x.is_inference()


def test_calls_never_exceed_the_batch_and_keep_each_images_conditioning():
    """Six images in two copies of a batch of three, whose prompts differ."""
    model, seen = h.recording(networks.unet())
    guider = basic(model, networks.unet_conditioning(5, rows=3))
    x = latent()
    twice = run(guider, lambda m: m.predict(torch.cat([m.x, 2 * m.x]), 1.0), x, 2)
    assert [len(part) for part in seen.x] == [3, 3]
    once = [run(guider, lambda m, k=k: m.predict(k * m.x, 1.0), x) for k in (1, 2)]
    torch.testing.assert_close(twice, torch.cat(once))
    same_prompt = run(basic(model, networks.unet_conditioning(5)), lambda m: m.predict(m.x, 1.0), x)
    assert not torch.allclose(same_prompt, once[0], rtol=1e-3)


def test_density_guidance_of_the_model_is_left_out():
    model = h.exact_model("eps")
    plain, guided = (
        run(basic(m, h.conditioning()), lambda m: m.predict(m.x, 3.0), latent(2, 3).new_ones(2, 3, h.SIZE, h.SIZE))
        for m in (model, h.guided_model(model, 0.05))
    )
    assert torch.equal(plain, guided)


def test_prior_guidance_of_the_model_is_left_out():
    model = h.exact_model("eps")
    patched = h.outputs(PriorGuidanceModel, model, 0.5, 2.0, True)[0]
    images = torch.rand(2, 3, h.SIZE, h.SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(run(basic(m, h.conditioning()), lambda m: m.x, images) for m in (model, patched)))


def test_patches_see_the_noise_levels_that_come():
    model, levels = h.kept(h.exact_model("eps").clone()), []

    def attention_patches(executor, x, t, c_concat, c_crossattn, control, transformer_options, *args, **kwargs):
        levels.append(transformer_options["sample_sigmas"])
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, *args, **kwargs)

    model.add_wrapper(WrappersMP.APPLY_MODEL, attention_patches)
    with torch.inference_mode():
        model_access.run_in_guider(
            basic(model, h.conditioning()), torch.ones(1, 3, h.SIZE, h.SIZE), lambda m: m.predict(m.x, 2.0), 1, [4, 2]
        )
    assert levels[0].tolist() == [4.0, 2.0]
    assert levels[0].dtype == torch.float32 and levels[0].device == model.load_device


def test_an_interrupt_stops_at_the_next_call():
    model, seen = h.recording(h.exact_model("eps"))

    def work(m):
        for _ in range(5):
            m.predict(m.x, 2.0)
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(basic(model, h.conditioning()), work, torch.ones(1, 3, h.SIZE, h.SIZE), 5)
    assert seen.calls == 1


def test_progress_counts_the_calls(monkeypatch):
    steps = []
    monkeypatch.setattr(
        model_access.latent_preview, "prepare_callback", lambda *_: lambda i, x0, x, total: steps.append((i, total, type(x0)))
    )

    def work(m):
        v = divergence.rademacher(m.x, 0, 0)
        divergence.directional_derivative(lambda x: m.predict(x, 2.0), m.x, v, "forward")
        divergence.directional_derivative(lambda x: m.predict(x, 2.0), m.x, v, "differences", 0.1)

    run(basic(h.exact_model("eps"), h.conditioning()), work, torch.ones(1, 3, h.SIZE, h.SIZE), 4)
    assert [(i, total) for i, total, _ in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize(
    "value, words",
    [
        (torch.zeros(2, 4, 8, 8), ["empty", "(2, 4, 8, 8)"]),
        (torch.ones(0, 4, 8, 8), ["empty", "(0, 4, 8, 8)"]),
        (torch.full((1, 4, 8, 8), torch.nan), ["NaN"]),
        (torch.ones(1, 16, 8, 8), ["16 channels", "takes 4"]),
        (torch.ones(1, 4, 8, 8, 8), ["(1, 4, 8, 8, 8)", "4 dimensions"]),
    ],
    ids=["zeros", "no image", "NaN", "channels", "dimensions"],
)
def test_latents_are_checked_before_any_call(value, words):
    model, seen = h.recording(networks.unet())
    with pytest.raises(ValueError) as error:
        run(basic(model, networks.unet_conditioning()), lambda m: m.predict(m.x, 1.0), value)
    assert all(word in str(error.value) for word in words)
    assert seen.calls == 0


def test_what_is_not_a_guider_is_refused():
    with pytest.raises(ValueError, match="guider is a Tensor"):
        run(torch.ones(1), None, latent())


def test_wrappers_of_the_model_count():
    model = networks.unet().clone()
    model.add_wrapper(WrappersMP.APPLY_MODEL, lambda executor, *a, **k: 2 * executor(*a, **k))
    ones = latent()
    plain = run(basic(networks.unet(), networks.unet_conditioning()), lambda m: m.predict(m.x, 1.0), ones)
    torch.testing.assert_close(run(basic(model, networks.unet_conditioning()), lambda m: m.predict(m.x, 1.0), ones), 2 * plain)


@pytest.mark.parametrize("shape, masked", [((2, 40, 24), False), ((2, 3, 40, 8), False), ((2, 40, 24), True)], ids=str)
def test_attention_in_slices_is_attention(shape, masked):
    """Value and forward derivative, with few of the scores at once."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dq = (torch.randn(shape, generator=generator) for _ in range(4))
    mask = torch.randn(40, 40, generator=generator) if masked else None
    most = []

    def attend(q):
        scores = model_access.attention.attention_pytorch

        def counted(part, *args, **kwargs):
            most.append(part.shape[-2])
            return scores(part, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_access.attention, "attention_pytorch", counted)
            patch.setattr(model_access, "_SCORES", 1)
            return model_access._sliced_attention(None, q, k, v, 3, mask, skip_reshape=len(shape) == 4)

    value, slope = divergence.directional_derivative(attend, q, dq, divergence.FORWARD)
    whole = lambda q: model_access.attention.attention_pytorch(q, k, v, 3, mask, skip_reshape=len(shape) == 4)
    _, expected = divergence.directional_derivative(whole, q, dq, divergence.FORWARD)
    torch.testing.assert_close(value, whole(q))
    torch.testing.assert_close(slope, expected)
    assert max(most) == 8 and sum(most) == 40

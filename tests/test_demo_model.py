"""The built-in trained model, as users use it: the host's own nodes on it, and the pack's."""

import comfy.model_management
import comfy.sd
import pytest
import torch
from density_guidance.nodes import LoadDemoModel
from density_guidance.nodes.builtin import demo as demo_model
from density_guidance.nodes.builtin import packed_weights
from density_guidance.nodes.builtin.demo import ANY, CLASSES
from density_guidance.testing import host_runs as h

STEPS, BATCH = 6, 2


@pytest.fixture(scope="module")
def demo():
    """(model, vae, positive, negative, latent) for "rock"."""
    return h.outputs(LoadDemoModel, "rock", BATCH)


def sampled(demo, model=None, sampler="euler", steps=STEPS, **kwargs):
    own, _, positive, negative, latent = demo
    model = h.kept(model or own.clone())
    sigmas = h.schedule(model, steps, "karras")
    return h.sampled(model, sampler, sigmas, latent, positive=positive, **kwargs)


@pytest.fixture(scope="module")
def plain(demo):
    return sampled(demo)


def high_energy(samples):
    """Energy of the difference between neighbours, for each image."""
    return samples.diff(dim=3).square().mean((1, 2, 3)) + samples.diff(dim=2).square().mean((1, 2, 3))


def test_classes_are_those_of_the_weights():
    model, _, classes, context = demo_model.load()
    assert classes == CLASSES and len(context) == len(CLASSES) + 1
    for i, name in enumerate([*CLASSES, ANY]):
        _, _, positive, negative, latent = h.outputs(LoadDemoModel, name, 2)
        assert torch.equal(positive[0][0], context[i : i + 1]) and torch.equal(negative[0][0], context[-1:])
        assert latent["samples"].shape == (2, 3, 64, 64)


def test_packed_weights_are_within_half_a_step():
    """Small weights keep their float16 values; of a large one, each row has a step, and a row of zeros stays zeros."""
    generator = torch.Generator().manual_seed(0)
    weights = {"bias": torch.randn(9, generator=generator), "large": torch.randn(300, 100, 7, generator=generator)}
    weights["large"][3] = 0
    weights["large"][4, 0, 0] = 300  # its row's step is that of the largest
    packed = packed_weights.pack(weights)
    assert packed["large"].dtype == torch.int8 and packed["large"].shape == (300, 100, 7) and len(packed) == 3
    found = packed_weights.unpack(packed)
    assert torch.equal(found["bias"], weights["bias"].half().float()) and found["large"][3].eq(0).all()
    error = (found["large"] - weights["large"]).abs().flatten(1).amax(1)
    assert (error <= 0.51 * packed["large.step"].float()).all()
    assert packed["large.step"][0].item() == pytest.approx(0.25, rel=0.1)


def test_latents_are_scaled_pixels(demo):
    x, base = torch.randn(2, 3, 8, 8), demo[0].model
    assert torch.equal(base.process_latent_in(x), 2 * x) and torch.equal(base.process_latent_out(2 * x), x)


def test_it_predicts_its_own_images_from_noise(demo, plain):
    """Its denoised is nearer to an image than what is best without knowing images: white noise of their variance."""
    model, _, positive, *_ = demo
    clean, sigma = demo_model.SCALE * plain, 0.3
    x = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    comfy.model_management.load_models_gpu([model])
    device = model.load_device
    with torch.inference_mode():
        denoised = model.model.apply_model(
            x.to(device),
            torch.full((BATCH,), sigma, device=device),
            c_crossattn=positive[0][0].expand(BATCH, -1, -1).to(device),
        ).cpu()
    variance = clean.var()
    white = x * variance / (variance + sigma**2)
    assert (denoised - clean).square().mean() < 0.8 * (white - clean).square().mean()


def test_ksampler_makes_images_of_the_class(demo):
    """Snow is brighter than undergrowth; the images are smooth beside noise, and within their range."""
    import nodes as host_nodes

    bright = {}
    for name in ("snow", "undergrowth"):
        model, vae, positive, negative, latent = h.outputs(LoadDemoModel, name, BATCH)
        with torch.inference_mode():
            samples = host_nodes.KSampler().sample(
                h.kept(model), h.SEED, STEPS, 2.0, "euler", "simple", positive, negative, latent
            )[0]
            images = host_nodes.VAEDecode().decode(vae, samples)[0]
        assert images.shape == (BATCH, 64, 64, 3) and 0 <= images.min() and images.max() <= 1
        torch.testing.assert_close(images, ((samples["samples"] + 1) / 2).clamp(0, 1).movedim(1, -1))
        assert (high_energy(samples["samples"]) < 2 * samples["samples"].var((1, 2, 3))).all()  # 4 times it, for white noise
        bright[name] = images.mean()
    assert bright["snow"] > bright["undergrowth"] + 0.1


def test_cfg_is_neutral_at_one(demo, plain):
    assert torch.equal(sampled(demo, negative=demo[3], cfg=1.0), plain)
    assert (sampled(demo, negative=demo[3], cfg=3.0) - plain).abs().mean() > 0.01


@pytest.mark.parametrize(
    "node, inputs",
    [
        ("PerturbedAttentionGuidance", {"scale": 2.0}),
        ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
        ("FreeU_V2", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}),
    ],
)
def test_attention_guidance_of_the_host_works(demo, plain, node, inputs):
    patched = sampled(demo, h.core_node(node, model=demo[0], **inputs), negative=demo[3])
    assert patched.isfinite().all() and (patched - plain).abs().mean() > 1e-5


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_lora_patches_the_weights(demo, plain, strength):
    key = "middle_block.1.transformer_blocks.0.attn2.to_v"
    out, into = demo[0].model.state_dict()[f"diffusion_model.{key}.weight"].shape
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"diffusion_model.{key}.lora_up.weight": torch.randn(out, 4, generator=generator),
        f"diffusion_model.{key}.lora_down.weight": torch.randn(4, into, generator=generator),
    }
    model, _ = comfy.sd.load_lora_for_models(demo[0], None, lora, strength, 0.0)
    change = (sampled(demo, model) - plain).abs().mean()
    assert change > 1e-3 if strength else change == 0


def test_guidance_turns_the_detail_of_every_image(demo):
    less, plain, more = (
        high_energy(sampled(demo, steps=12, sampler=h.guided_sampler(q, sampler="euler"))) for q in (0.8, 0.5, 0.2)
    )
    print(less.tolist(), plain.tolist(), more.tolist())
    assert (less < plain).all() and (plain < more).all()


@pytest.mark.parametrize("dtype, compute_dtype", [(torch.float16, torch.float32), (torch.bfloat16, None)])
def test_weights_of_less_precision_give_the_same_images(demo, dtype, compute_dtype):
    reduced = sampled(demo, demo_model.load(dtype, compute_dtype)[0], steps=1)
    difference = (reduced - sampled(demo, steps=1)).square().mean().sqrt()
    assert difference <= (0 if dtype == torch.float16 else 0.005)  # its numbers are float16


def test_bad_class_and_missing_weights(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="class_name is 'water'; it must be one of paving, .*, any"):
        h.outputs(LoadDemoModel, "water", 1)
    monkeypatch.setattr(demo_model, "WEIGHTS", tmp_path / "demo_model.safetensors")
    with pytest.raises(FileNotFoundError, match="demo_model.safetensors is missing: .*train_demo_model.py"):
        h.outputs(LoadDemoModel, "rock", 1)


def test_latent_of_another_model(demo):
    with pytest.raises(ValueError, match="4 x 64 x 64 elements per image; this built-in model takes 3 channels"):
        h.sampled(demo[0], "euler", h.schedule(demo[0], 2), {"samples": torch.ones(1, 4, 64, 64)}, positive=demo[2])

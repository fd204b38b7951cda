"""One tiny model of every family that the host knows: its own classes and configurations, with random weights.

Each entry of `FAMILIES` gives the host's configuration class, the sizes that make it tiny, and a latent and
conditioning that fit. `build` goes through that class's `get_model`, as the host's loader does, and fills in weights
that depend on nothing but their shape and order.
"""

from dataclasses import dataclass, field

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_patcher
import comfy.supported_models as supported
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.hunyuan_video.model import HunyuanVideoParams

CPU = torch.device("cpu")
WIDTH = 32  # of every text embedding

# Arguments that networks of newer hosts ask for and older ones do not know, with the values that the host would find in a
# checkpoint of the family. They are passed where the network's class has them.
_NEWER = {
    FluxParams: {"txt_ids_dims": []},
    ChromaParams: {"txt_ids_dims": [], "vec_in_dim": None},
    ChromaRadianceParams: {"txt_ids_dims": [], "vec_in_dim": None, "use_x0": False, "use_sequential_txt_ids": False},
    HunyuanVideoParams: {"meanflow_sum": False},
}


def newer_arguments(params):
    """Those of `_NEWER` that the host's `params`, a dataclass, has."""
    return {name: value for name, value in _NEWER[params].items() if name in params.__dataclass_fields__}


# fmt: off
_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "context_dim": WIDTH, "use_spatial_transformer": True, "legacy": False,
    "use_checkpoint": False, "use_linear_in_transformer": True, "adm_in_channels": None,
    "use_temporal_attention": False, "use_temporal_resblock": False, "num_head_channels": 16, "num_heads": -1,
}
_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 16, "context_in_dim": WIDTH,
    "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 12, 12],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    **newer_arguments(FluxParams),
}
_CHROMA = {
    **{k: v for k, v in _FLUX.items() if k not in ("vec_in_dim", "guidance_embed")}, "image_model": "chroma",
    "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 64, "hidden_dim": 64, "n_layers": 1,
    **newer_arguments(ChromaParams),
}
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": 64, "ffn_dim": 64, "freq_dim": 32,
    "text_dim": WIDTH, "text_len": 8, "num_heads": 2, "num_layers": 1,
}
_HUNYUAN_VIDEO = {
    **{k: v for k, v in _FLUX.items() if k != "txt_ids_dims"}, "image_model": "hunyuan_video", "patch_size": [1, 2, 2],
    "theta": 256, "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
    **newer_arguments(HunyuanVideoParams),
}
_LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 48, "cap_feat_dim": WIDTH, "n_layers": 1,
    "n_refiner_layers": 1, "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 8, 8],
    "axes_lens": [300, 64, 64], "ffn_dim_multiplier": 1.0, "multiple_of": 16,
}
_COSMOS = {
    "max_img_h": 16, "max_img_w": 16, "max_frames": 8, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "concat_padding_mask": True, "model_channels": 64, "num_blocks": 1, "num_heads": 2,
    "mlp_ratio": 2.0, "crossattn_emb_channels": WIDTH, "pos_emb_cls": "rope3d", "use_adaln_lora": True,
    "adaln_lora_dim": 16,
}
# Newer hosts check that the heads of queries are a multiple of those of keys, which here are one for each 64 of the context.
_ONE_KEY_HEAD = {"project_cond_tokens": True} if newer_arguments(FluxParams) else {}
_SECONDS = {
    f"conditioner.conditioners.seconds_{which}.embedder.embedding.{part}": torch.full(shape, 0.01)
    for which in ("start", "total")
    for part, shape in {"0.weights": (128,), "1.weight": (768, 257), "1.bias": (768,)}.items()
}


@dataclass(frozen=True)
class Family:
    """One architecture: how to make it tiny, and what it samples."""

    title: str  # as people know it
    config: type  # of the host
    sizes: dict  # of its network
    shape: tuple  # (channels, ...) of one latent
    text: int = WIDTH
    pooled: int | None = None  # width of the pooled text embedding
    conditioning: dict = field(default_factory=dict)  # further entries
    cfg: float = 3.0  # 1 for a guidance-distilled model
    checkpoint: dict = field(default_factory=dict)  # the weights from which the host tells variants apart


FAMILIES = {
    "sd15": Family("Stable Diffusion 1.5", supported.SD15, _UNET, (4, 16, 16)),
    "sd2": Family("Stable Diffusion 2 (v)", supported.SD20, _UNET, (4, 16, 16), checkpoint={
        "output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.linspace(-1, 1, 8)}),
    "sdxl": Family("SDXL", supported.SDXL, {**_UNET, "num_classes": "sequential", "adm_in_channels": 1536 + 16},
                   (4, 16, 16), pooled=16),
    "svd": Family("Stable Video Diffusion (EDM)", supported.SVD_img2vid, {
        **_UNET, "in_channels": 8, "num_classes": "sequential", "adm_in_channels": 768, "use_temporal_attention": True,
        "use_temporal_resblock": True, "extra_ff_mix_layer": True, "use_spatial_context": True,
        "merge_strategy": "learned_with_images", "merge_factor": 0.0, "video_kernel_size": [3, 1, 1],
        "disable_temporal_crossattention": False}, (4, 16, 16)),
    "cascade": Family("Stable Cascade (stage C)", supported.Stable_Cascade_C, {
        "stable_cascade_stage": "c", "c_r": 16, "c_cond": 32, "c_hidden": [32, 32], "nhead": [2, 2],
        "blocks": [[1, 1], [1, 1]], "c_clip_text": WIDTH, "c_clip_text_pooled": 16, "c_clip_img": 768}, (16, 8, 8),
        pooled=16),
    "sd3": Family("Stable Diffusion 3", supported.SD3, {
        "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 1, "input_size": None, "adm_in_channels": 16,
        "num_patches": 64, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 64}}},
        (16, 16, 16), pooled=16),
    "aura": Family("AuraFlow", supported.AuraFlow, {
        "cond_seq_dim": WIDTH, "n_double_layers": 1, "n_layers": 2, "max_seq": 64, "dim": 64, "n_heads": 2,
        "global_conddim": 64}, (4, 16, 16)),
    "flux": Family("Flux (guidance-distilled)", supported.Flux, _FLUX, (16, 16, 16), pooled=16, cfg=1.0),
    "flux_schnell": Family("Flux schnell", supported.FluxSchnell, {**_FLUX, "guidance_embed": False}, (16, 16, 16),
                           pooled=16, cfg=1.0),
    "chroma": Family("Chroma", supported.Chroma, _CHROMA, (16, 16, 16), pooled=16),
    "chroma_radiance": Family("Chroma Radiance (pixels)", supported.ChromaRadiance, {
        **_CHROMA, "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 16,
        "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 4, "nerf_tile_size": 32,
        "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32, **newer_arguments(ChromaRadianceParams)},
        (3, 32, 32), pooled=16),
    "lumina2": Family("Lumina 2", supported.Lumina2, _LUMINA, (16, 16, 16)),
    "z_image": Family("Z-Image", supported.ZImage, {
        **_LUMINA, "dim": 256, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24], "rope_theta": 256.0,
        "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}, (16, 16, 16)),
    "qwen_image": Family("Qwen-Image", supported.QwenImage, {
        "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6)}, (16, 1, 16, 16)),
    "cosmos": Family("Cosmos", supported.CosmosT2V, {
        **_COSMOS, "image_model": "cosmos", "block_config": "FA-CA-MLP", "block_x_format": "THWBD",
        "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable"},
        (16, 2, 8, 8)),
    "cosmos_predict2": Family("Cosmos Predict2", supported.CosmosT2IPredict2, {
        **_COSMOS, "image_model": "cosmos_predict2", "pos_emb_learnable": True, "rope_enable_fps_modulation": False},
        (16, 1, 8, 8)),
    "wan21": Family("Wan 2.1", supported.WAN21_T2V, _WAN, (16, 3, 8, 8)),
    "wan22": Family("Wan 2.2 (5B)", supported.WAN22_T2V, {**_WAN, "in_dim": 48, "out_dim": 48}, (48, 3, 8, 8)),
    "hunyuan_video": Family("HunyuanVideo", supported.HunyuanVideo, _HUNYUAN_VIDEO, (16, 3, 8, 8), pooled=16, cfg=1.0),
    "hunyuan_image": Family("HunyuanImage 2.1", supported.HunyuanImage21, {
        **_HUNYUAN_VIDEO, "patch_size": [1, 1], "in_channels": 64, "out_channels": 64, "vec_in_dim": None,
        "axes_dim": [16, 16], "guidance_embed": False}, (64, 8, 8)),
    "pixart": Family("PixArt Sigma", supported.PixArtSigma, {
        "image_model": "pixart_sigma", "num_heads": 2, "patch_size": 2, "hidden_size": 32, "in_channels": 4, "depth": 1,
        "input_size": 40, "pe_interpolation": 1, "micro_condition": False, "caption_channels": WIDTH,
        "model_max_length": 8}, (4, 40, 40)),
    "omnigen2": Family("OmniGen2", supported.Omnigen2, {
        "image_model": "omnigen2", "axes_dim_rope": [8, 8, 8], "axes_lens": [64, 64, 64], "hidden_size": 48,
        "in_channels": 16, "multiple_of": 16, "norm_eps": 1e-5, "num_attention_heads": 2, "num_kv_heads": 1,
        "num_layers": 1, "num_refiner_layers": 1, "patch_size": 2, "text_feat_dim": WIDTH, "timestep_scale": 1000.0},
        (16, 16, 16), conditioning={"attention_mask": torch.ones(1, 8, dtype=torch.long)}),
    "hunyuan3d": Family("Hunyuan3D 2", supported.Hunyuan3Dv2, {
        "image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 2.0,
        "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "qkv_bias": True, "guidance_embed": False}, (64, 32)),
    "ltxv": Family("LTX-Video", supported.LTXV, {
        "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 32, "attention_head_dim": 16,
        "num_attention_heads": 2, "caption_channels": WIDTH, "num_layers": 1}, (128, 3, 4, 4),
        conditioning={"attention_mask": torch.ones(1, 8, dtype=torch.long)}),
    "stable_audio": Family("Stable Audio", supported.StableAudio, {
        "audio_model": "dit1.0", "io_channels": 64, "embed_dim": 64, "cond_token_dim": 768, "global_cond_dim": 1536,
        "depth": 1, "num_heads": 1, **_ONE_KEY_HEAD}, (64, 32), text=768, checkpoint=_SECONDS),
    "ace_step": Family("ACE-Step", supported.ACEStep, {
        "audio_model": "ace", "attention_head_dim": 16, "in_channels": 8, "inner_dim": 32, "max_height": 16,
        "max_position": 256, "max_width": 256, "mlp_ratio": 2.0, "num_attention_heads": 2, "num_layers": 1,
        "out_channels": 8, "patch_size": [16, 1], "rope_theta": 1000000.0, "speaker_embedding_dim": 512,
        "text_embedding_dim": WIDTH, "ssl_encoder_depths": [1, 1],
        "ssl_latent_dims": [16, 16], "ssl_names": ["mert", "m-hubert"], "lyric_encoder_vocab_size": 16,
        "lyric_hidden_size": 1024}, (8, 16, 16),
        conditioning={"conditioning_lyrics": torch.ones(1, 4, dtype=torch.long)}),
    "lotus": Family("Lotus (image to image)", supported.LotusD, {
        **_UNET, "num_classes": "sequential", "adm_in_channels": 4}, (4, 16, 16)),
}
# fmt: on


def build(name, dtype=torch.float32, seed=1):
    """A `ModelPatcher` of the host around the tiny model of family `name`, its weights in `dtype`, chosen by `seed`."""
    family = FAMILIES[name]
    config = family.config(family.sizes)
    config.unet_config.update(family.sizes)
    config.set_inference_dtype(dtype, None)
    model = config.get_model(dict(family.checkpoint), "", CPU)
    _fill(model, seed)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def control_net(name):
    """A `ControlNet` of the host, tiny, for a family that is a `UNetModel`."""
    sizes = {
        k: v
        for k, v in FAMILIES[name].sizes.items()
        if k not in ("out_channels", "use_temporal_attention", "use_temporal_resblock", "transformer_depth_output")
    }
    network = comfy.cldm.cldm.ControlNet(**sizes, hint_channels=3, device=CPU)
    _fill(network, 1)
    return comfy.controlnet.ControlNet(network, load_device=CPU)


def lora(name):
    """{key: weight} of a LoRA of rank 2 that changes every attention projection of the family's network."""
    generator, weights = torch.Generator().manual_seed(2), {}
    for key, weight in build(name).model.diffusion_model.state_dict().items():
        if ".to_" in key and weight.ndim == 2:
            key = "diffusion_model." + key.removesuffix(".weight")
            weights[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator)
            weights[f"{key}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator) / 8
    return weights


@torch.no_grad()
def _fill(module, seed):
    """Random weights of a trained network's scale: unit gain for matrices, near 1 for norms, near 0 for biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            noise /= weight[0].numel() ** 0.5
        elif name.endswith("bias"):
            noise *= 0.05
        else:
            noise = 1 + 0.05 * noise
        weight.copy_(noise)
    for name, buffer in module.named_buffers():  # those that a checkpoint brings along
        if name.endswith("pos_embed"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("rotary_pos_emb.inv_freq"):
            buffer.copy_(10000 ** -torch.linspace(0, 1, len(buffer)))


def latent(name, batch=2):
    """Zeros of the family's latent shape, (batch, ...)."""
    return torch.zeros(batch, *FAMILIES[name].shape)


def conditioning(name, seed):
    """A random prompt that fits the family."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    entries = dict(family.conditioning)
    if family.pooled:
        entries["pooled_output"] = torch.randn(1, family.pooled, generator=generator)
    return [[torch.randn(1, 8, family.text, generator=generator), entries]]


# No Gaussian path from noise to image: guidance of the prediction is refused by name.
REFUSED = {"lotus": "IMG_TO_IMG"}

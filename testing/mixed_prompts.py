"""Prompts of mixed nodes for a running server."""


def mixed_run(i):
    """Prompt number i, in the API's format: one of four graphs, always with a seed and a quantile of its own."""
    quantile, seed = round(0.05 + 0.9 * (i * 7 % 50) / 50, 3), 1000 + i
    percent = {"start_percent": 0.0, "end_percent": 1.0}
    graph = {
        "load": (
            "LoadExactDensityModel",
            {"prediction": ("eps", "v", "flow")[i % 3], "size": "32", "component": -1, "batch_size": 2},
        ),
        "mask": ("SolidMask", {"value": 0.5, "width": 48, "height": 16 + i % 32}),
    }
    density = {"quantile": quantile, "detail_shift": 0.05, **percent}
    prior = {"quantile": quantile, "scale": 1.0, "match_quantile": True}
    if i % 4 < 2:  # SamplerCustomAdvanced with the pack's own solver, or with another sampler in a region
        graph |= {
            "noise": ("RandomNoise", {"noise_seed": seed}),
            "prior": ("PriorGuidanceScale", {"noise": ["noise", 0], **prior}),
            "guider": ("BasicGuider", {"model": ["load", 0], "conditioning": ["load", 2]}),
            "sigmas": ("BasicScheduler", {"model": ["load", 0], "scheduler": "simple", "steps": 5, "denoise": 1.0}),
            "select": ("KSamplerSelect", {"sampler_name": ("dpmpp_2m", "euler_ancestral", "heun")[i % 3]}),
            "sampler": (
                "DensityGuidanceSampler",
                {**density, **({"sampler": ["select", 0], "mask": ["mask", 0]} if i % 4 else {})},
            ),
            "sampled": (
                "SamplerCustomAdvanced",
                {
                    "noise": ["noise" if i % 4 else "prior", 0],
                    "guider": ["guider", 0],
                    "sampler": ["sampler", 0],
                    "sigmas": ["sigmas", 0],
                    "latent_image": ["load", 3],
                },
            ),
        }
    else:  # KSampler, with one patch of the model or with two
        graph |= {
            "prior": ("PriorGuidanceModel", {"model": ["load", 0], **prior}),
            "patch": ("DensityGuidanceModel", {"model": ["prior" if i % 4 == 3 else "load", 0], **density}),
            "sampled": (
                "KSampler",
                {
                    "model": ["patch", 0],
                    "seed": seed,
                    "steps": 5,
                    "cfg": 2.0,
                    "sampler_name": ("euler", "dpmpp_2m_sde")[i % 2],
                    "scheduler": "normal",
                    "positive": ["load", 2],
                    "negative": ["load", 2],
                    "latent_image": ["load", 3],
                    "denoise": 1.0,
                },
            ),
        }
    graph["save"] = ("SaveLatent", {"samples": ["sampled", 0], "filename_prefix": f"mixed_{i}"})
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in graph.items()}

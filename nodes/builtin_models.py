"""The two models that come with the pack, and the readout of the exact one."""

import torch
from comfy_api.latest import io

from ..dg_core.units import require_whole
from .builtin import demo, exact
from .builtin.pixels import CHANNELS
from .host.inputs import CATEGORY, Floats, samples_of, sigmas_of

SIZES = [64, 48, 32]


class LoadExactDensityModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoadExactDensityModel",
            display_name="Load Exact Density Model",
            category=CATEGORY,
            description="A small built-in model of emoji pictures whose log-density is known exactly. Needs no "
                        "download; use it to see what density guidance does before you use it on your own model.",
            inputs=[
                io.Combo.Input(
                    "prediction", options=list(exact.PREDICTIONS), default="flow",
                    tooltip="Which kind of model it pretends to be: eps (like SD1.5, SDXL), v (like SD2) or flow (like "
                            "SD3, Flux). The density is the same; neutral: any."),
                io.Combo.Input(
                    "size", options=[str(s) for s in SIZES], default="64",
                    tooltip="Width and height of the pictures in pixels. 64 is the default."),
                io.Int.Input(
                    "component", default=-1, min=-1, max=127,
                    tooltip="Number of the picture, of the 128 that the density is made of, that the conditioning asks for, "
                            "like a prompt. -1 (neutral) asks for all."),
                io.Int.Input(
                    "batch_size", default=4, min=1, max=64,
                    tooltip="Number of pictures in the latent output, each with its own noise. 4 is the default."),
            ],
            outputs=[
                io.Model.Output(display_name="model",
                                tooltip="A model like any other: KSampler, CFG and patches work."),
                io.Vae.Output(display_name="vae", tooltip="Turns its latents into images; the latents are the pixels."),
                io.Conditioning.Output(display_name="conditioning", tooltip="The picture asked for by component."),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of the right size."),
            ],
        )

    @classmethod
    def execute(cls, prediction, size, component, batch_size):
        for name, value, options in (("prediction", prediction, list(exact.PREDICTIONS)),
                                     ("size", size, [str(s) for s in SIZES])):
            if value not in options:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(options)}")
        model, vae = exact.load(prediction, int(size))
        density = model.model.density
        weights = density.log_weights.exp()[None] if component < 0 else density.one_hot(component)
        latent = {"samples": torch.zeros(batch_size, exact.CHANNELS, density.size, density.size)}
        return io.NodeOutput(model, vae, [[weights.float()[:, None], {}]], latent)


class ExactLogDensity(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ExactLogDensity",
            display_name="Exact Log-Density",
            category=CATEGORY,
            description="Reads the exact log-density of pictures of the exact-density model, in bits per dimension: larger "
                        "means more detail. The pictures must be sampled down to a noise level above 0.",
            inputs=[
                io.Model.Input("model", tooltip="The model of LoadExactDensityModel, patched or not."),
                io.Latent.Input("latent", tooltip="What a sampler returned for the sigmas below."),
                io.Sigmas.Input("sigmas", tooltip="The noise levels sigma that made the latent; the density is read at the "
                                                  "last one, which must be above 0 (cut the last step with SplitSigmas)."),
            ],
            outputs=[
                Floats.Output(display_name="bits_per_dim", tooltip="-log2 p / D of every image of the latent."),
                io.String.Output(display_name="report", tooltip="The same numbers as text."),
            ],
        )

    @classmethod
    def execute(cls, model, latent, sigmas):
        bits = exact.read(model, samples_of("latent", latent), sigmas_of(sigmas))
        return io.NodeOutput(bits, "\n".join(f"image {i}: {b:.4f} bits per dimension" for i, b in enumerate(bits)))


CLASSES = ["paving", "snow", "rock", "undergrowth", "grass", "sand", "earth"]  # in the order of the weights' file
ANY = "any"
BATCHES = 1, 64


class LoadDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoadDemoModel",
            display_name="Load Demo Model",
            category=CATEGORY,
            description="A small trained diffusion model of ground seen from above, 64 x 64 pixels, with the architecture of "
                        "Stable Diffusion. Needs no download; CFG, attention patches and LoRAs made for it work.",
            inputs=[
                io.Combo.Input(
                    "class_name", options=[*CLASSES, ANY], default="rock",
                    tooltip="What the positive conditioning asks for. any (neutral) asks for nothing in particular."),
                io.Int.Input("batch_size", default=4, min=BATCHES[0], max=BATCHES[1],
                             tooltip="Number of pictures in the latent output, each with its own noise. 4 is the default."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A v-prediction model; Stable Diffusion's noise levels, drawn out to more noise."),
                io.Vae.Output(display_name="vae", tooltip="Turns its latents into images; the latents are the pixels."),
                io.Conditioning.Output(display_name="positive", tooltip="The class asked for by class_name."),
                io.Conditioning.Output(display_name="negative", tooltip="No class, for classifier-free guidance."),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of the right size."),
            ],
        )

    @classmethod
    def execute(cls, class_name, batch_size):
        names = [*CLASSES, ANY]
        if class_name not in names:
            raise ValueError(f"class_name is {class_name!r}; it must be one of {', '.join(names)}")
        require_whole("batch_size", batch_size, *BATCHES)
        model, vae, _, context = demo.load()
        latent = {"samples": torch.zeros(batch_size, CHANNELS, demo.SIZE, demo.SIZE)}
        positive, negative = ([[context[i:i + 1], {}]] for i in (names.index(class_name), len(CLASSES)))
        return io.NodeOutput(model, vae, positive, negative, latent)

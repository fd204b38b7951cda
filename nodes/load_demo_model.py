"""The built-in trained model."""

import torch
from comfy_api.latest import io

from ..dg_core.units import require_whole
from . import demo_model
from .pixels import CHANNELS
from .schema import CATEGORY

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
        model, vae, _, context = demo_model.load()
        latent = {"samples": torch.zeros(batch_size, CHANNELS, demo_model.SIZE, demo_model.SIZE)}
        positive, negative = ([[context[i:i + 1], {}]] for i in (names.index(class_name), len(CLASSES)))
        return io.NodeOutput(model, vae, positive, negative, latent)

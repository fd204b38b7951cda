"""The two models that come with the pack, and the readout of the exact one."""

from typing import Any

import torch
from comfy_api.latest import io

from .builtin import demo, exact
from .host.inputs import CATEGORY, Floats, schemas


class LoadExactDensityModel(io.ComfyNode):
    """The exact-density model with its VAE, a conditioning and an empty latent: see `builtin.exact`."""

    INPUTS = exact.INPUTS

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadExactDensityModel",
            display_name="Load Exact Density Model",
            category=CATEGORY,
            description="A small built-in model, of emojis or of textures, whose log-density is known exactly. Try density "
            "guidance on it before you use it on your own model. Needs no download.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                io.Model.Output(display_name="model", tooltip="A model like any other: samplers, CFG and patches work."),
                io.Vae.Output(display_name="vae", tooltip="Turns its latents into images; the latents are the pixels."),
                io.Conditioning.Output(display_name="conditioning", tooltip="The emoji or texture asked for by component."),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of the right size."),
            ],
        )

    @classmethod
    def execute(
        cls, prediction: str, size: str, component: int, batch_size: int, kind: str = exact.KIND.default
    ) -> io.NodeOutput:
        return io.NodeOutput(*exact.loaded(prediction, size, component, batch_size, kind))


class ExactLogDensity(io.ComfyNode):
    """Exact bits per dimension of a latent of that model: see `exact.read`."""

    INPUTS = exact.READ_INPUTS

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExactLogDensity",
            display_name="Exact Log-Density",
            category=CATEGORY,
            description="Reads how much detail images of the exact-density model have: exactly, in bits per dimension; larger "
            "means more. Sample them down to a noise level above 0.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                Floats.Output(display_name="bits_per_dim", tooltip="-log2 p / D of each image. For Density Contact Sheet."),
                io.String.Output(display_name="report", tooltip="The same numbers as text."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, latent: dict[str, Any], sigmas: torch.Tensor) -> io.NodeOutput:
        return io.NodeOutput(*exact.readout(model, latent, sigmas))


class LoadDemoModel(io.ComfyNode):
    """The demo model with its VAE, two conditionings and an empty latent: see `builtin.demo`."""

    INPUTS = demo.INPUTS

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadDemoModel",
            display_name="Load Demo Model",
            category=CATEGORY,
            description="A small trained diffusion model of ground seen from above, 64 x 64 pixels: see what density guidance "
            "does to a trained network, in seconds on a CPU. Needs no download.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model; v-prediction, with Stable Diffusion's noise levels and more noise beyond.",
                ),
                io.Vae.Output(display_name="vae", tooltip="Turns its latents into images; the latents are the pixels."),
                io.Conditioning.Output(display_name="positive", tooltip="The class asked for by class_name."),
                io.Conditioning.Output(display_name="negative", tooltip="No class, for classifier-free guidance."),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of the right size."),
            ],
        )

    @classmethod
    def execute(cls, class_name: str, batch_size: int) -> io.NodeOutput:
        return io.NodeOutput(*demo.loaded(class_name, batch_size))

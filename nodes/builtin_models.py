"""The two models that come with the pack, and the readout of the exact one."""

from typing import Any

import torch
from comfy_api.latest import io

from .builtin import demo, exact
from .builtin.pixels import CHANNELS
from .host.inputs import CATEGORY, Choice, Floats, Number, Socket, samples_of, schemas, sigmas_of

CLASSES = ["paving", "snow", "rock", "undergrowth", "grass", "sand", "earth"]  # in the order of the weights' file
ANY = "any"
PREDICTION = Choice(
    "prediction",
    "Which kind of model it pretends to be: eps (like SD1.5, SDXL), v (like SD2) or flow (like SD3, Flux). The "
    "density is the same.",
    options=tuple(exact.PREDICTIONS),
    default="flow",
    neutral="any",
)
SIZE = Choice(
    "size",
    "Width and height of the images, in pixels: 32, 48 or 64 for emoji; 32, 64, 128 or 256 for textures.",
    options=("64", "48", "32", "128", "256"),
    default="64",
)
COMPONENT = Number(
    "component",
    "What the conditioning asks for, like a prompt: the number of one of 128 emojis, or of one of the textures "
    f"{', '.join(f'{name} ({i})' for i, name in enumerate(exact.TEXTURES))}. -1 asks for all.",
    default=-1,
    neutral=-1,
    low=-1,
    high=127,
)
CLASS_NAME = Choice(
    "class_name",
    "The kind of ground that the output positive asks for. 'any': no particular one.",
    options=(*CLASSES, ANY),
    default="rock",
    neutral=ANY,
)
KIND = Choice(
    "kind",
    "emoji: 128 emojis; detail is grain, and changes by the number asked for. textures: photographed textures; detail is "
    "contrast, and changes are amplified as by trained models.",
    options=tuple(exact.KINDS),
    default=exact.EMOJI,
    optional=True,
)
BATCH_SIZE = Number("batch_size", "Number of images in the latent, each with its own noise.", default=4, low=1, high=64)


class LoadExactDensityModel(io.ComfyNode):
    """The exact-density model with its VAE, a conditioning and an empty latent: see `builtin.exact`."""

    INPUTS = (PREDICTION, SIZE, COMPONENT, BATCH_SIZE, KIND)

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
    def execute(cls, prediction: str, size: str, component: int, batch_size: int, kind: str = exact.EMOJI) -> io.NodeOutput:
        model, vae = exact.load(PREDICTION.check(prediction), int(SIZE.check(size)), KIND.check(kind))
        component, batch_size = COMPONENT.check(component), BATCH_SIZE.check(batch_size)
        density = model.model.density
        weights = density.log_weights.exp()[None] if component < 0 else density.one_hot(component)
        latent = {"samples": torch.zeros(batch_size, exact.CHANNELS, density.size, density.size)}
        return io.NodeOutput(model, vae, [[weights.float()[:, None], {}]], latent)


class ExactLogDensity(io.ComfyNode):
    """Exact bits per dimension of a latent of that model: see `exact.read`."""

    INPUTS = (
        Socket("model", "The model of Load Exact Density Model, patched or not.", io.Model),
        Socket("latent", "What a sampler returned for the sigmas below.", io.Latent),
        Socket(
            "sigmas",
            "The noise levels sigma that made the latent. The density is read at the last one, which must be "
            "above 0: cut the last step off with SplitSigmas.",
            io.Sigmas,
        ),
    )

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
        bits = exact.read(model, samples_of("latent", latent), sigmas_of(sigmas))
        return io.NodeOutput(bits, "\n".join(f"image {i}: {b:.4f} bits per dimension" for i, b in enumerate(bits)))


class LoadDemoModel(io.ComfyNode):
    """The demo model with its VAE, two conditionings and an empty latent: see `builtin.demo`."""

    INPUTS = (CLASS_NAME, BATCH_SIZE)

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
        chosen, batch_size = CLASS_NAME.options.index(CLASS_NAME.check(class_name)), BATCH_SIZE.check(batch_size)
        model, vae, _, context = demo.load()
        latent = {"samples": torch.zeros(batch_size, CHANNELS, demo.SIZE, demo.SIZE)}
        positive, negative = ([[context[i : i + 1], {}]] for i in (chosen, len(CLASSES)))
        return io.NodeOutput(model, vae, positive, negative, latent)

"""The log-density of latents under any model, with an error bar."""

from typing import Any

from comfy_api.latest import io

from .host.inputs import CATEGORY, Floats, schemas
from .host.readout import INPUTS, log_density


class LogDensity(io.ComfyNode):
    """Bits per dimension of any LATENT under a guider's model: see `host.readout`."""

    INPUTS = INPUTS

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LogDensity",
            display_name="Log-Density",
            category=CATEGORY,
            description="Measures how much detail an image has under your model, in bits per dimension, with an error bar. "
            "Works with every image that you can encode.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                Floats.Output(
                    display_name="bits_per_dim",
                    tooltip="-log2 p / D of each image: larger means more detail, as with detail_shift.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Each value with its standard error, the squared norm of eps over D, and how it was computed.",
                ),
                io.Image.Output(display_name="plot", tooltip="Rate of log-density against log-SNR, a curve for each image."),
            ],
        )

    @classmethod
    def execute(
        cls, guider: Any, latent: dict[str, Any], steps: int, probes: int, seed: int, noise_floor: float
    ) -> io.NodeOutput:
        return io.NodeOutput(*log_density(guider, latent, steps, probes, seed, noise_floor))

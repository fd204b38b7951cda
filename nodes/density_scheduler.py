"""Noise levels for a run, placed where the log-density is decided."""

from typing import Any

from comfy_api.latest import io

from .host.inputs import CATEGORY, schemas
from .host.scheduling import DENOISE, LATENT, MODEL, STEPS, density_sigmas


class DensityScheduler(io.ComfyNode):
    """SIGMAS on the clock of `dg_core.levels`: see `host.scheduling`."""

    INPUTS = (MODEL, STEPS, DENOISE, LATENT)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DensityScheduler",
            display_name="Density Scheduler",
            category=CATEGORY,
            description="Places the noise levels of a run where the amount of detail is decided, so that few steps meet the "
            "amount that guidance asks for. Use it in place of BasicScheduler.",
            inputs=schemas(cls.INPUTS),
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels sigma, for SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model: Any, steps: int, denoise: float, latent_image: Any = None) -> io.NodeOutput:
        return io.NodeOutput(density_sigmas(model, steps, denoise, latent_image))

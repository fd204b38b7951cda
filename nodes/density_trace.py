"""A sampling run whose log-density is recorded on the way."""

from typing import Any

import torch
from comfy_api.latest import io

from .host.inputs import CATEGORY, Socket, Widget, schemas
from .host.tracing import trace

SAMPLER = Socket("sampler", "Any sampler but dpm_fast and dpm_adaptive, guided or not.", io.Sampler)


class DensityTrace(io.ComfyNode):
    """SamplerCustomAdvanced with a record of the log-density: see `host.tracing`."""

    INPUTS = (
        Socket("noise", "The starting noise, for instance of RandomNoise.", io.Noise),
        Socket("guider", "The model with its prompt, from BasicGuider or CFGGuider.", io.Guider),
        SAMPLER,
        Socket("sigmas", "The schedule: noise levels sigma, descending.", io.Sigmas),
        Socket("latent_image", "The latent to start from, without a noise mask.", io.Latent),
        Widget(
            "exact_trace",
            "Off: records what is known for free. On: also the log-density at every step; takes two to four times as long.",
            default=False,
            neutral=False,
        ),
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DensityTrace",
            display_name="Density Trace",
            category=CATEGORY,
            description="Shows what guidance does and when: SamplerCustomAdvanced with a record of the log-density. The image "
            "is the same; no extra model call unless exact_trace is on.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                io.Latent.Output(display_name="output", tooltip="What the sampler returned."),
                io.Latent.Output(display_name="denoised_output", tooltip="The last prediction of the finished image."),
                io.Image.Output(display_name="plot", tooltip="The record as curves against log-SNR."),
                io.String.Output(display_name="trace", tooltip="The record as JSON: one row for each step."),
            ],
        )

    @classmethod
    def execute(
        cls, noise: Any, guider: Any, sampler: Any, sigmas: torch.Tensor, latent_image: dict[str, Any], exact_trace: bool
    ) -> io.NodeOutput:
        return io.NodeOutput(*trace(noise, guider, SAMPLER.check(sampler), sigmas, latent_image, exact_trace))

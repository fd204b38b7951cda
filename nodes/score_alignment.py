"""Score alignment of a guider's model: does scaling the starting noise change the final log-density?"""

from typing import Any

import torch
from comfy_api.latest import io

from ..dg_core.alignment import SCALE_RANGE
from .host.alignment_report import score_alignment
from .host.alignment_run import INPUTS, CheckSettings
from .host.inputs import CATEGORY, Floats, schemas


class ScoreAlignmentCheck(io.ComfyNode):
    """Whether scaling the noise changes the detail of a sample: see `host.alignment_run`."""

    INPUTS = INPUTS

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ScoreAlignmentCheck",
            display_name="Score Alignment Check",
            category=CATEGORY,
            description="Checks whether scaling the starting noise (prior guidance) changes the detail, for your model, prompt "
            "and seed, and by how much. Samples the image too.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                io.Boolean.Output(
                    display_name="aligned",
                    tooltip="True if scaling works for every image of the batch. Connect it to a switch.",
                ),
                io.Float.Output(
                    display_name="cosine", tooltip="Smallest cosine of the batch, from -1 to 1: above 0 is aligned. No unit."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The numbers of each image, where alignment is lost, the cost, and what to do.",
                ),
                io.Image.Output(
                    display_name="plot", tooltip="Cosine against log-SNR, a line for each image. Only where it ends matters."
                ),
                io.Latent.Output(display_name="latent", tooltip="The finished sample."),
                io.Float.Output(
                    display_name="scale",
                    tooltip="The noise scale that makes detail_shift, for Prior Guidance Scale with match_quantile off; the "
                    "mean over the batch. 1 if an image is not aligned or no scale from "
                    f"{SCALE_RANGE[0]:g} to {SCALE_RANGE[1]:g} reaches it.",
                ),
                Floats.Output(
                    display_name="response", tooltip="Predicted change in bits per dimension for 1% more noise, for each image."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        guider: Any,
        noise: Any,
        latent_image: dict[str, Any],
        sigmas: torch.Tensor,
        method: str,
        end_percent: float,
        probes: int,
        seed: int,
        detail_shift: float = CheckSettings.detail_shift,
        scale_step: float = CheckSettings.scale_step,
        sampler: Any = None,
    ) -> io.NodeOutput:
        settings = CheckSettings(method, end_percent, probes, seed, detail_shift, scale_step)
        return io.NodeOutput(*score_alignment(guider, noise, latent_image, sigmas, settings, sampler))

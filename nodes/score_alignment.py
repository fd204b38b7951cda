"""Score alignment of a guider's model: does scaling the starting noise change the final log-density?"""

from typing import Any

import torch
from comfy_api.latest import io

from ..dg_core import alignment
from .host import alignment_report
from .host.alignment_run import ENOUGH_STEPS, GUIDER, INPUTS, NOISE, SAMPLER, CheckSettings, examine, finished_latent
from .host.inputs import CATEGORY, Floats, Socket, schemas


class ScoreAlignmentCheck(io.ComfyNode):
    """Whether scaling the noise changes the detail of a sample: see `host.alignment_run`."""

    INPUTS = (
        GUIDER,
        NOISE,
        Socket("latent_image", "The empty latent, which sets size and number of images; without a noise mask.", io.Latent),
        Socket(
            "sigmas",
            f"The schedule of noise levels sigma, from the model's maximum down; {ENOUGH_STEPS} steps are usually "
            "enough. The node places the levels between its ends where the density changes; finite scale keeps "
            "those of the schedule.",
            io.Sigmas,
        ),
        *INPUTS,
        SAMPLER,
    )

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
                    f"{alignment.SCALE_RANGE[0]:g} to {alignment.SCALE_RANGE[1]:g} reaches it.",
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
        detail_shift: float = 0.02,
        scale_step: float = 0.01,
        sampler: Any = None,
    ) -> io.NodeOutput:
        settings = CheckSettings(method, end_percent, probes, seed, detail_shift, scale_step)
        check = examine(guider, noise, latent_image, sigmas, settings, sampler)
        return io.NodeOutput(
            check.aligned,
            float(torch.nan_to_num(check.final_cosine, nan=-1.0).min()),
            alignment_report.text(check, settings),
            alignment_report.plot(check),
            finished_latent(latent_image, check.samples),
            check.common_scale(detail_shift),
            check.response.tolist(),
        )

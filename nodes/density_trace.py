"""A sampling run whose log-density is recorded on the way."""

import json
import math
from typing import Any

import torch
from comfy_api.latest import io

from .host.inputs import CATEGORY, Socket, Widget, schemas
from .host.tracing import TracedSampler, plot_of, require_traceable

SAMPLER = Socket("sampler", "Any sampler but dpm_fast and dpm_adaptive, guided or not.", io.Sampler)


class DensityTrace(io.ComfyNode):
    INPUTS = (
        Socket("noise", "The starting noise, for instance of RandomNoise.", io.Noise),
        Socket("guider", "The model with its prompt, from BasicGuider or CFGGuider.", io.Guider),
        SAMPLER,
        Socket("sigmas", "The schedule: noise levels sigma, descending.", io.Sigmas),
        Socket("latent_image", "The latent to start from, without a noise mask.", io.Latent),
        Widget(
            "exact_trace",
            "Off: records what is known for free. On: also the log-density at every step, at two to four times "
            "the model's time.",
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
        SAMPLER.check(sampler)
        require_traceable(sampler, latent_image)
        traced = TracedSampler(sampler, exact_trace)
        output, denoised = _sample(noise, guider, traced, sigmas, latent_image)
        record = json.dumps(_numbers(traced.record), indent=1, allow_nan=False)
        return io.NodeOutput(output, denoised, plot_of(traced.record["rows"]), record)


def _sample(*inputs: Any) -> tuple[Any, ...]:
    """The outputs of the host's SamplerCustomAdvanced, which is a V3 node in newer hosts only."""
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced as node

    return node.execute(*inputs).result if hasattr(node, "execute") else node().sample(*inputs)


def _numbers(value: Any) -> Any:
    """A record with None in the place of numbers that JSON has not: NaN and infinity."""
    if isinstance(value, dict):
        return {key: _numbers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

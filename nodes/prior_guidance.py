"""Prior guidance, as a noise source and as a model patch: the starting noise at a quantile of its log-density."""

from typing import Any

from comfy_api.latest import io

from .host.inputs import CATEGORY, Socket, schemas
from .host.prior_run import INPUTS, PriorSettings, ScaledNoise, scaled_patch

NOISE = Socket(
    "noise", "The noise to scale, for instance of RandomNoise. Keeps its seed; DisableNoise stays as it is.", io.Noise
)
MODEL = Socket("model", "The model whose starting noise is scaled. Its weights are not changed.", io.Model)


class PriorGuidanceScale(io.ComfyNode):
    """A NOISE at a quantile of its log-density: see `host.prior_run`."""

    INPUTS = (NOISE, *INPUTS)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PriorGuidanceScale",
            display_name="Prior Guidance Scale",
            category=CATEGORY,
            description="Scales the starting noise: larger noise gives more detail, smaller noise less. The gentlest detail "
            "control; the sampling itself does not change.",
            inputs=schemas(cls.INPUTS),
            outputs=[io.Noise.Output(display_name="noise", tooltip="The scaled noise, for SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise: Any, quantile: float, scale: float, match_quantile: bool) -> io.NodeOutput:
        settings = PriorSettings(quantile, scale, match_quantile)
        return io.NodeOutput(ScaledNoise(NOISE.check(noise), settings))


class PriorGuidanceModel(io.ComfyNode):
    """The same for every run of a MODEL: see `prior_run.scaled_patch`."""

    INPUTS = (MODEL, *INPUTS)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PriorGuidanceModel",
            display_name="Prior Guidance (model)",
            category=CATEGORY,
            description="Prior Guidance Scale as a patch of the model: for KSampler, which makes its own noise.",
            inputs=schemas(cls.INPUTS),
            outputs=[io.Model.Output(display_name="model", tooltip="The model with scaled starting noise.")],
        )

    @classmethod
    def execute(cls, model: Any, quantile: float, scale: float, match_quantile: bool) -> io.NodeOutput:
        settings = PriorSettings(quantile, scale, match_quantile)
        return io.NodeOutput(scaled_patch(MODEL.check(model), settings))

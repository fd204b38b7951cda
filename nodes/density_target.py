"""A sampler that ends at a wanted log-density."""

from comfy_api.latest import io

from .host.inputs import CATEGORY, schemas
from .host.target_run import INPUTS, TargetSampler, TargetSettings


class DensityTargetSampler(io.ComfyNode):
    """A SAMPLER that ends at a wanted log-density: see `host.target_run`."""

    INPUTS = INPUTS

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DensityTargetSampler",
            display_name="Density Target Sampler",
            category=CATEGORY,
            description="Gives images a measured amount of detail: a number, a change, or the same for a whole batch. Takes "
            "as long as several plain runs. A sampler: connect it to SamplerCustomAdvanced.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="The sampler, for SamplerCustomAdvanced or Density Trace. What it reached is in the log and in the "
                    "trace.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, target: str, value: float, reference_image: int, tolerance: float, max_passes: int, probes: int
    ) -> io.NodeOutput:
        return io.NodeOutput(TargetSampler(TargetSettings(target, value, reference_image, tolerance, max_passes, probes)))

"""Variations of an image at an unchanged log-density, as a sampler, and the batch for a grid of them."""

from typing import Any

import torch
from comfy_api.latest import io

from .host.inputs import CATEGORY, DETAIL_SHIFTS, LEVELS, MASK, QUANTILES, Floats, schemas
from .host.steering import GuidanceSettings, solver_sampler
from .host.variation_run import GRID_INPUTS, INPUTS, VARIATION_INDEX, VariationSettings, variation_grid


class StochasticDetailVariation(io.ComfyNode):
    """The pack's own solver with noise at an unchanged log-density: see `host.variation_run`."""

    INPUTS = (*LEVELS, *INPUTS[:-1], QUANTILES, DETAIL_SHIFTS, VARIATION_INDEX, MASK)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StochasticDetailVariation",
            display_name="Stochastic Detail Variation",
            category=CATEGORY,
            description="Varies the texture or the structure of an image and keeps its amount of detail. A sampler: connect it "
            "to SamplerCustomAdvanced or SamplerCustom.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="The sampler. With strength 0 it does exactly what Density Guidance Sampler does with no sampler "
                    "connected.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        quantile: float,
        detail_shift: float,
        vary: str,
        strength: float,
        start_percent: float,
        end_percent: float,
        variation_seed: int,
        correction: str,
        probes: int,
        quantiles: list[float] | None = None,
        detail_shifts: list[float] | None = None,
        variation_index: list[float] | None = None,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        settings = GuidanceSettings(quantile, detail_shift, quantiles=quantiles, detail_shifts=detail_shifts, mask=mask)
        window = start_percent, end_percent
        variation = VariationSettings(vary, strength, *window, variation_seed, correction, probes, variation_index)
        return io.NodeOutput(solver_sampler(settings, variation))


class VariationGrid(io.ComfyNode):
    """The batch for a grid of variations, out of one LATENT: see `variation_run.variation_grid`."""

    INPUTS = GRID_INPUTS

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VariationGrid",
            display_name="Variation Grid",
            category=CATEGORY,
            description="Makes the batch for a grid out of one latent: a row for each quantile, a column for each variation, "
            "all from the same starting noise.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The batch, row by row, for the sampler."),
                Floats.Output(
                    display_name="quantiles", tooltip="Quantile q of each image, for quantiles of Stochastic Detail Variation."
                ),
                Floats.Output(
                    display_name="variation_index",
                    tooltip="Number of each image in its row, for variation_index of Stochastic Detail Variation: "
                    "every row has the same noise in a column.",
                ),
                io.Float.Output(
                    display_name="levels",
                    is_output_list=True,
                    tooltip="Quantile q of each row, for levels of Density Contact Sheet.",
                ),
                io.Int.Output(display_name="columns", tooltip="Number of images in a row, for batch_size of Rebatch Images."),
            ],
        )

    @classmethod
    def execute(cls, latent: dict[str, Any], quantiles: str, variations: int) -> io.NodeOutput:
        return io.NodeOutput(*variation_grid(latent, quantiles, variations))

"""Density guidance as a sampler and as a model patch."""

from typing import Any

import torch
from comfy_api.latest import io, ui

from .host.inputs import CATEGORY, CURVE, DETAIL_SHIFTS, LEVELS, MASK, QUANTILES, WINDOW, Socket, schemas
from .host.plots import curve_image
from .host.steering import GuidanceSettings, GuidedSampler, guided_patch, solver_sampler

SAMPLER = Socket(
    "sampler",
    "The sampler to guide, any of ComfyUI's.",
    io.Sampler,
    unlinked="the pack's own third-order solver, one model call per step, which meets the asked-for shift best",
)
MODEL = Socket("model", "The model whose sampling is guided. Its weights are not changed.", io.Model)


def _output(result: Any, settings: GuidanceSettings) -> io.NodeOutput:
    """The node's output, with the curve as a plot on the node where there is one."""
    return io.NodeOutput(result, ui=None if settings.curve is None else ui.PreviewImage(curve_image(settings.curve)))


class DensityGuidanceSampler(io.ComfyNode):
    """Guidance of any SAMPLER, or of the pack's own solver: see `host.steering`."""

    INPUTS = (*LEVELS, *WINDOW, SAMPLER, QUANTILES, DETAIL_SHIFTS, MASK, CURVE)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DensityGuidanceSampler",
            display_name="Density Guidance Sampler",
            category=CATEGORY,
            description="Turns detail up or down, at no extra model call. A sampler: connect it to SamplerCustomAdvanced or "
            "SamplerCustom.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="The guided sampler. With neutral settings it does exactly what the connected one does.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        quantile: float,
        detail_shift: float,
        start_percent: float,
        end_percent: float,
        sampler: Any = None,
        quantiles: list[float] | None = None,
        detail_shifts: list[float] | None = None,
        mask: torch.Tensor | None = None,
        curve: list[float] | None = None,
    ) -> io.NodeOutput:
        settings = GuidanceSettings(quantile, detail_shift, start_percent, end_percent, quantiles, detail_shifts, mask, curve)
        if sampler is None:
            return _output(solver_sampler(settings), settings)
        return _output(GuidedSampler(SAMPLER.check(sampler), settings), settings)


class DensityGuidanceModel(io.ComfyNode):
    """Guidance of every run of a MODEL: see `steering.guided_patch`."""

    INPUTS = (MODEL, *LEVELS, *WINDOW, QUANTILES, DETAIL_SHIFTS, MASK, CURVE)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DensityGuidanceModel",
            display_name="Density Guidance (model)",
            category=CATEGORY,
            description="Turns detail up or down, as a patch of the model: for KSampler, and for nodes of other packs that "
            "sample by themselves.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model with guidance. It acts after CFG and after every other patch of the prediction.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        quantile: float,
        detail_shift: float,
        start_percent: float,
        end_percent: float,
        quantiles: list[float] | None = None,
        detail_shifts: list[float] | None = None,
        mask: torch.Tensor | None = None,
        curve: list[float] | None = None,
    ) -> io.NodeOutput:
        settings = GuidanceSettings(quantile, detail_shift, start_percent, end_percent, quantiles, detail_shifts, mask, curve)
        return _output(guided_patch(MODEL.check(model), settings), settings)

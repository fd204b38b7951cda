"""Density guidance as a sampler and as a model patch."""

import comfy.patcher_extension
from comfy_api.latest import io, ui

from .host.inputs import CATEGORY, curve_input, floats, guidance_inputs, mask_input, mask_of, per_image_inputs, require
from .host.plots import curve_image
from .host.steering import GuidanceSettings, GuidedSampler, run_guided, solver_sampler


def _settings(quantile, detail_shift, start_percent, end_percent, quantiles, detail_shifts, mask, curve):
    return GuidanceSettings(quantile, detail_shift, start_percent, end_percent,
                            floats("quantiles", quantiles), floats("detail_shifts", detail_shifts), mask_of(mask),
                            floats("curve", curve))


def _output(result, settings):
    """The node's output, with the curve as a picture in the node where there is one."""
    return io.NodeOutput(result, ui=None if settings.curve is None else ui.PreviewImage(curve_image(settings.curve)))


class DensityGuidanceSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DensityGuidanceSampler",
            display_name="Density Guidance Sampler",
            category=CATEGORY,
            description="A sampler that steers how much detail the image gets, by its log-density, at no extra model "
                        "call. Connect it to SamplerCustomAdvanced or SamplerCustom.",
            inputs=[
                *guidance_inputs(),
                io.Sampler.Input(
                    "sampler", optional=True,
                    tooltip="The sampler to guide, any of ComfyUI's. Not connected (neutral): the pack's own third-order "
                            "solver, one model call per step, which meets the asked-for shift most exactly."),
                *per_image_inputs(),
                mask_input(),
                curve_input(),
            ],
            outputs=[io.Sampler.Output(
                display_name="sampler",
                tooltip="The guided sampler. With quantile 0.5 and detail_shift 0 it does exactly what the connected "
                        "one does.")],
        )

    @classmethod
    def execute(cls, quantile, detail_shift, start_percent, end_percent, sampler=None, quantiles=None,
                detail_shifts=None, mask=None, curve=None):
        settings = _settings(
            quantile, detail_shift, start_percent, end_percent, quantiles, detail_shifts, mask, curve)
        if sampler is None:
            return _output(solver_sampler(settings), settings)
        require("sampler", sampler, "sample", "a SAMPLER, for instance of KSamplerSelect")
        return _output(GuidedSampler(sampler, settings), settings)


class DensityGuidanceModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DensityGuidanceModel",
            display_name="Density Guidance (model)",
            category=CATEGORY,
            description="Steers how much detail images get, as a patch of the model: for KSampler, and for nodes of "
                        "other packs that sample by themselves.",
            inputs=[
                io.Model.Input("model", tooltip="The model whose sampling is guided. Its weights are not changed."),
                *guidance_inputs(),
                *per_image_inputs(),
                mask_input(),
                curve_input(),
            ],
            outputs=[io.Model.Output(
                display_name="model",
                tooltip="The model with guidance. It acts after CFG and after every other patch of the prediction.")],
        )

    @classmethod
    def execute(cls, model, quantile, detail_shift, start_percent, end_percent, quantiles=None, detail_shifts=None,
                mask=None, curve=None):
        settings = _settings(
            quantile, detail_shift, start_percent, end_percent, quantiles, detail_shifts, mask, curve)
        require("model", model, "add_wrapper", "a MODEL")
        if settings.neutral:
            return _output(model, settings)

        def guide_run(executor, *args, **kwargs):
            return run_guided(settings, executor, *args, **kwargs)

        patched = model.clone()
        patched.add_wrapper(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, guide_run)
        return _output(patched, settings)

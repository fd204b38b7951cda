"""Variations of an image at an unchanged log-density, as a sampler, and the batch for a grid of them."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ..dg_core.schedule import Schedule
from ..dg_core.units import require_whole
from ..dg_core.variation import (
    CORRECTIONS,
    MAX_PROBES,
    MAX_STRENGTH,
    ImageNoise,
    Variation,
    indices_of,
    require_correction,
    require_strength,
)
from .host.inputs import (
    CATEGORY,
    Floats,
    batch_index_of,
    floats,
    level_inputs,
    mask_input,
    mask_of,
    numbers,
    per_image_inputs,
    require,
)
from .host.masks import amount_of
from .host.model_access import require_one_part
from .host.steering import GuidanceSettings, repeated, require_batch, require_window, solver_sampler, steps_of_percents

CUSTOM = "custom"
# Shares of the sampling, by the kind of the noise path, whose shares mean other log-SNRs. Chosen so that the changes lie in high and in low spatial frequencies (docs/variation.md).
WINDOWS = {
    "fine details": {"VE": (0.65, 1.0), "flow": (0.75, 1.0)},
    "structure": {"VE": (0.0, 0.3), "flow": (0.0, 0.3)},
    "everything": {"VE": (0.0, 1.0), "flow": (0.0, 1.0)},
}
VARY = [*WINDOWS, CUSTOM]
MAX_SEED = 2**64 - 1
MAX_INDEX = 2**31 - 1
MAX_VARIATIONS = 64


@dataclass(frozen=True)
class VariationSettings:
    """The inputs of the variation. Raises ValueError, naming the input, where one is out of range."""

    vary: str = "fine details"
    strength: float = 0.5
    start_percent: float = 0.0
    end_percent: float = 1.0
    variation_seed: int = 0
    correction: str = "expected"
    probes: int = 1
    variation_index: tuple[float, ...] | None = None  # one for each image, in the place of its starting noise

    def __post_init__(self):
        if self.vary not in VARY:
            raise ValueError(f"vary is {self.vary!r}; it must be one of {', '.join(VARY)}")
        if self.vary == CUSTOM:
            require_window(self.start_percent, self.end_percent)
        require_strength(self.strength)
        require_whole("variation_seed", self.variation_seed, 0, MAX_SEED)
        require_correction(self.correction, self.probes)
        for i, value in enumerate(self.variation_index or ()):
            require_whole(f"variation_index, for image {i},", value, 0, MAX_INDEX)

    def of_run(
        self, guider: Any, schedule: Schedule, latent: torch.Tensor, start: torch.Tensor, mask: torch.Tensor | None,
        denoise_mask: torch.Tensor | None,
    ) -> Variation | None:
        """The `Variation` of a run, None where no step gets noise.

        latent: (B, ...), of the run's device. start: (B, ...), what tells images apart: their starting noise, or the state of a
        run that goes on without any. mask: where to vary, (N, height, width); denoise_mask: of an inpainting run.
        """
        batch = len(start)
        require_batch("variation_index", self.variation_index, batch)
        if self.strength == 0:
            return None
        custom = self.start_percent, self.end_percent
        percents = custom if self.vary == CUSTOM else WINDOWS[self.vary][schedule.path.kind]
        steps = steps_of_percents(guider.inner_model.model_sampling, schedule, *percents)
        indices = repeated(self.variation_index, batch) if self.variation_index else indices_of(start)
        amount = amount_of(mask, latent, denoise_mask)
        variation = None if steps is None else Variation(
            steps, self.strength, ImageNoise(self.variation_seed, indices), self.correction, self.probes, amount)
        if variation is None or not any(variation.raised_levels(schedule, i) for i in range(schedule.steps)):
            logging.warning(
                "Stochastic detail variation: no step of this run of %d lies between %g and %g of the sampling (vary: %s), the "
                "first step and the last one to zero noise not counted; nothing is varied.",
                schedule.steps, *percents, self.vary)
            return None
        require_one_part(guider)
        if amount is not None and not amount.any():
            logging.warning("Stochastic detail variation: no element of the latent lies in the mask; nothing is varied.")
            return None
        return variation


class StochasticDetailVariation(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StochasticDetailVariation",
            display_name="Stochastic Detail Variation",
            category=CATEGORY,
            description="A sampler that gives variations of an image, in its texture or in its structure, with as much "
                        "detail as it had: noise along the surfaces of equal log-density. Connect it to "
                        "SamplerCustomAdvanced or SamplerCustom.",
            inputs=[
                *level_inputs(),
                io.Combo.Input(
                    "vary", options=VARY, default="fine details",
                    tooltip="When noise is added: late for fine details, early for structure. custom takes start_percent "
                            "and end_percent. Neutral: any, with strength 0."),
                io.Float.Input(
                    "strength", default=0.5, min=0.0, max=MAX_STRENGTH, step=0.05, round=0.001,
                    tooltip="Strength c of the noise, as a multiple of the reverse SDE's. 0 is neutral: the plain image; 1 "
                            "is as much as an SDE sampler adds. No unit."),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, round=0.001,
                    tooltip="For custom: share of the sampling at which noise begins. 0 (neutral) is pure noise."),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001,
                    tooltip="For custom: share of the sampling at which noise ends. 1 (neutral) is the finished image. The "
                            "last step to zero noise gets none."),
                io.Int.Input(
                    "variation_seed", default=0, min=0, max=MAX_SEED, control_after_generate=True,
                    tooltip="Which variation. Each image of a batch has noise of its own, from this seed and the noise "
                            "that it starts from. No unit; neutral: any, with strength 0."),
                io.Combo.Input(
                    "correction", options=list(CORRECTIONS), default="expected",
                    tooltip="How the change of log-density by the noise is undone. expected: at no extra model call, with "
                            "noise in every second step. hutchinson: 1 + probes calls in a step with noise, more exact. "
                            "exact: 1 + 2 probes calls. Neutral: any, with strength 0."),
                io.Int.Input(
                    "probes", default=1, min=1, max=MAX_PROBES,
                    tooltip="Number of pieces into which hutchinson and exact cut the noise of a step, each corrected by "
                            "itself; every one costs model calls. 1 is the default and the least, and enough up to strength "
                            "1."),
                *per_image_inputs(),
                Floats.Input(
                    "variation_index", optional=True,
                    tooltip="Which variation of the seed each image of the batch gets, from 0; images with the same number "
                            "get the same noise. No unit. Not connected (neutral): one for each starting noise."),
                mask_input(),
            ],
            outputs=[io.Sampler.Output(
                display_name="sampler",
                tooltip="The sampler. With strength 0 it does exactly what Density Guidance Sampler does without a sampler "
                        "connected.")],
        )

    @classmethod
    def execute(cls, quantile, detail_shift, vary, strength, start_percent, end_percent, variation_seed, correction,
                probes, quantiles=None, detail_shifts=None, variation_index=None, mask=None):
        settings = GuidanceSettings(quantile, detail_shift, quantiles=floats("quantiles", quantiles),
                                    detail_shifts=floats("detail_shifts", detail_shifts), mask=mask_of(mask))
        return io.NodeOutput(solver_sampler(settings, VariationSettings(
            vary, strength, start_percent, end_percent, variation_seed, correction, probes,
            floats("variation_index", variation_index))))


class VariationGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="VariationGrid",
            display_name="Variation Grid",
            category=CATEGORY,
            description="Repeats one latent for a grid of quantiles (rows) and variations (columns), all from the same "
                        "starting noise, to be sampled as one batch.",
            inputs=[
                io.Latent.Input("latent", tooltip="The latent to vary; the first image of it is taken."),
                io.String.Input(
                    "quantiles", default="0.3, 0.5, 0.7",
                    tooltip="The quantile q of each row, separated by commas, between 0.001 and 0.999. 0.5 is neutral. No "
                            "unit."),
                io.Int.Input("variations", default=4, min=1, max=MAX_VARIATIONS,
                             tooltip="Number of variations in each row. 4 is the default."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The batch, row by row, for the sampler."),
                Floats.Output(display_name="quantiles", tooltip="Quantile q of each image, for the input quantiles of the "
                                                                "variation node."),
                Floats.Output(display_name="variation_index",
                              tooltip="Number of each image in its row, for the input variation_index of the variation node."),
                io.Float.Output(display_name="levels", is_output_list=True,
                                tooltip="The quantile q of each row, for the labels of a contact sheet."),
                io.Int.Output(display_name="columns",
                              tooltip="Number of images in a row, for the batch size of RebatchImages."),
            ],
        )

    @classmethod
    def execute(cls, latent, quantiles, variations):
        require("latent", latent, "keys", "a LATENT")
        samples, mask = latent.get("samples"), latent.get("noise_mask")
        if not torch.is_tensor(samples) or samples.is_nested or not len(samples):
            raise ValueError("latent has no image, or packs several parts into one; connect a LATENT with an image of one part")
        rows = numbers("quantiles", quantiles)
        for value in rows:
            GuidanceSettings(quantile=value)
        variations = require_whole("variations", variations, 1, MAX_VARIATIONS)
        count = len(rows) * variations
        indices = batch_index_of("latent", latent, len(samples))
        first = 0 if indices is None else int(indices[0])
        grid = {**latent, "samples": _repeat_first(samples, count), "batch_index": [first] * count}
        # The host takes the masks of a video for its frames, and gives them to every image of the batch.
        if mask is not None and not (samples.ndim == 5 and mask.ndim < 5):
            grid["noise_mask"] = _repeat_first(mask[None] if mask.ndim == 2 else mask, count)
        return io.NodeOutput(grid, [q for q in rows for _ in range(variations)],
                             [float(i) for _ in rows for i in range(variations)], rows, variations)


def _repeat_first(tensor, count):
    return tensor[:1].repeat(count, *[1] * (tensor.ndim - 1))

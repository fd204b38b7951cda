"""Variations of an image at an unchanged log-density, as a sampler, and the batch for a grid of them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_api.latest import io

from ..dg_core.schedule import Schedule
from ..dg_core.variation import CORRECTIONS, MAX_PROBES, MAX_STRENGTH, ImageNoise, Variation, indices_of
from .host.inputs import (
    CATEGORY,
    DETAIL_SHIFTS,
    END_PERCENT,
    LEVELS,
    MASK,
    QUANTILE,
    QUANTILES,
    START_PERCENT,
    Choice,
    Floats,
    Number,
    Numbers,
    NumberText,
    Seed,
    Socket,
    batch_index_of,
    check_fields,
    require,
    schemas,
)
from .host.masks import amount_of
from .host.model_access import require_one_part
from .host.steering import GuidanceSettings, repeated, require_batch, require_window, solver_sampler, steps_of_percents

CUSTOM = "custom"
# Shares of the sampling, by the kind of the noise path, whose shares mean other log-SNRs. Chosen so that the changes lie in
# high and in low spatial frequencies (docs/variation.md).
WINDOWS = {
    "fine details": {"VE": (0.65, 1.0), "flow": (0.75, 1.0)},
    "structure": {"VE": (0.0, 0.3), "flow": (0.0, 0.3)},
    "everything": {"VE": (0.0, 1.0), "flow": (0.0, 1.0)},
}
VARIATION_INDEX = Numbers(
    "variation_index",
    "Which variation of the seed each image of the batch gets, from 0; equal numbers give equal noise.",
    each=Number("variation_index", "", default=0, low=0, high=2**31 - 1),
    unlinked="one for each starting noise",
)
VARY = Choice(
    "vary",
    "What changes. fine details: texture (noise late in the sampling). structure: composition and shapes (noise "
    "early). everything: both. custom: from start_percent to end_percent.",
    options=(*WINDOWS, CUSTOM),
    default="fine details",
    neutral="any, with strength 0",
)
VARIATION_SEED = Seed(
    "variation_seed",
    "Which variation: change it and keep the seed of the noise. Each image of a batch has noise of its own, "
    "from this seed and its starting noise.",
    neutral="any, with strength 0",
)
INPUTS = (
    VARY,
    Number(
        "strength",
        "How much noise. 1 is as much as an SDE sampler adds, 0 gives the plain image. Start with 0.5 to 1.",
        symbol="c",
        default=0.5,
        neutral=0.0,
        low=0.0,
        high=MAX_STRENGTH,
        step=0.05,
    ),
    replace(START_PERCENT, text="For custom: noise begins here; 0 is pure noise."),
    replace(END_PERCENT, text="For custom: noise ends here; 1 is the finished image. The last step to zero noise gets none."),
    VARIATION_SEED,
    Choice(
        "correction",
        "How the change of detail by the noise is undone. expected: no extra model call, noise in every second "
        "step. hutchinson: more exact; a step with noise takes one call, and one more for each noise piece. exact: more exact "
        "still; two more for each noise piece.",
        options=tuple(CORRECTIONS),
        default="expected",
        neutral="any, with strength 0",
    ),
    Number(
        "probes",
        "Number of pieces into which hutchinson and exact cut the noise of a step, each corrected by itself and each "
        "at the cost of model calls. 1 is enough up to strength 1.",
        shown="noise pieces",
        default=1,
        low=1,
        high=MAX_PROBES,
    ),
    VARIATION_INDEX,
)
ROW_QUANTILES = NumberText(
    "quantiles", "The quantile of each row, separated by commas.", each=QUANTILE, default="0.3, 0.5, 0.7", neutral="0.5"
)
VARIATIONS = Number("variations", "Number of variations in each row.", default=4, low=1, high=64)


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
    variation_index: Sequence[float] | None = None  # one for each image, in the place of its starting noise

    def __post_init__(self) -> None:
        check_fields(self, INPUTS)
        if self.vary == CUSTOM:
            require_window(self.start_percent, self.end_percent)

    def of_run(
        self,
        guider: Any,
        schedule: Schedule,
        latent: torch.Tensor,
        start: torch.Tensor,
        mask: torch.Tensor | None,
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
        variation = (
            None
            if steps is None
            else Variation(steps, self.strength, ImageNoise(self.variation_seed, indices), self.correction, self.probes, amount)
        )
        if variation is None or not any(variation.raised_levels(schedule, i) for i in range(schedule.steps)):
            logging.warning(
                "Stochastic detail variation: no step of this run of %d lies between %g and %g of the sampling (vary: %s), the "
                "first step and the last one to zero noise not counted; nothing is varied.",
                schedule.steps,
                *percents,
                self.vary,
            )
            return None
        require_one_part(guider)
        if amount is not None and not amount.any():
            logging.warning("Stochastic detail variation: no element of the latent lies in the mask; nothing is varied.")
            return None
        return variation


class StochasticDetailVariation(io.ComfyNode):
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
        return io.NodeOutput(
            solver_sampler(
                settings,
                VariationSettings(
                    vary, strength, start_percent, end_percent, variation_seed, correction, probes, variation_index
                ),
            )
        )


class VariationGrid(io.ComfyNode):
    INPUTS = (Socket("latent", "The latent to vary; its first image is taken.", io.Latent), ROW_QUANTILES, VARIATIONS)

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
    def execute(cls, latent: dict[str, Any], quantiles: list[float], variations: int) -> io.NodeOutput:
        require("latent", latent, "keys", "a LATENT")
        samples, mask = latent.get("samples"), latent.get("noise_mask")
        if not torch.is_tensor(samples) or samples.is_nested or not len(samples):
            raise ValueError("latent is empty or combines video and audio; connect a single image or video latent")
        rows, variations = ROW_QUANTILES.check(quantiles), VARIATIONS.check(variations)
        count = len(rows) * variations
        indices = batch_index_of("latent", latent, len(samples))
        first = 0 if indices is None else int(indices[0])
        grid = {**latent, "samples": _repeat_first(samples, count), "batch_index": [first] * count}
        # The host takes the masks of a video for its frames, and gives them to every image of the batch.
        if mask is not None and not (samples.ndim == 5 and mask.ndim < 5):
            grid["noise_mask"] = _repeat_first(mask[None] if mask.ndim == 2 else mask, count)
        return io.NodeOutput(
            grid,
            [q for q in rows for _ in range(variations)],
            [float(i) for _ in rows for i in range(variations)],
            rows,
            variations,
        )


def _repeat_first(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor[:1].repeat(count, *[1] * (tensor.ndim - 1))

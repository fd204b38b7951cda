"""Variation of a run: its inputs and settings, and the batch for a grid."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_api.latest import io

from ...dg_core.schedule import Schedule
from ...dg_core.variation import CORRECTIONS, MAX_PROBES, MAX_STRENGTH, ImageNoise, Variation, indices_of
from .inputs import (
    END_PERCENT,
    QUANTILE,
    START_PERCENT,
    Choice,
    Number,
    Numbers,
    NumberText,
    Seed,
    Socket,
    batch_index_of,
    check_fields,
    defaults,
)
from .masks import amount_of
from .model_access import require_one_part
from .settings import repeated, require_batch, require_window, steps_of_percents

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
    "early). everything: both. custom: noise from start_percent to end_percent.",
    options=(*WINDOWS, CUSTOM),
    default="fine details",
    neutral="any, with strength 0",
)
VARIATION_SEED = Seed(
    "variation_seed",
    "Which variation: change this and keep the seed of the noise. Each image of a batch gets noise of its own, "
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
        "step. hutchinson: more exact; one extra call for each noise piece. exact: more exact still; two extra calls for each "
        "noise piece.",
        options=tuple(CORRECTIONS),
        default="expected",
        neutral="any, with strength 0",
    ),
    Number(
        "probes",
        "Number of pieces into which hutchinson and exact cut the noise of a step. Each is corrected by itself and costs "
        "model calls. 1 is enough up to strength 1.",
        shown="noise pieces",
        default=1,
        low=1,
        high=MAX_PROBES,
    ),
    VARIATION_INDEX,
)
LATENT = Socket("latent", "The latent to vary; only its first image is used.", io.Latent)
ROW_QUANTILES = NumberText(
    "quantiles", "The quantile of each row, separated by commas.", each=QUANTILE, default="0.3, 0.5, 0.7", neutral="0.5"
)
VARIATIONS = Number("variations", "Number of variations in each row.", default=4, low=1, high=64)
GRID_INPUTS = LATENT, ROW_QUANTILES, VARIATIONS
_DEFAULT = defaults(INPUTS)


@dataclass(frozen=True)
class VariationSettings:
    """The inputs of the variation. Raises ValueError, naming the input, where one is out of range."""

    vary: str = _DEFAULT["vary"]
    strength: float = _DEFAULT["strength"]
    start_percent: float = _DEFAULT["start_percent"]
    end_percent: float = _DEFAULT["end_percent"]
    variation_seed: int = _DEFAULT["variation_seed"]
    correction: str = _DEFAULT["correction"]
    probes: int = _DEFAULT["probes"]
    variation_index: Sequence[float] | None = None  # one for each image, in place of its starting noise

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

        latent: (B, ...), on the device of the run. start: (B, ...), by which images are told apart: their starting noise, or
        the first state of a run that goes on without noise. mask: where to vary, (N, height, width), or None. denoise_mask:
        of an inpainting run, or None. Raises ValueError, naming the input, for lists that do not fit the batch.
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
                "Stochastic detail variation: none of the %d steps lies between %g and %g of the sampling (vary: %s; the first "
                "step and the last one to zero noise do not count); nothing is varied.",
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


def variation_grid(
    latent: dict[str, Any], quantiles: str, variations: int
) -> tuple[dict[str, Any], list[float], list[float], list[float], int]:
    """(LATENT of the grid, quantile and number of every image in its row, quantile of every row, number of columns)."""
    rows, columns = ROW_QUANTILES.check(quantiles), VARIATIONS.check(variations)
    indices = [float(i) for _ in rows for i in range(columns)]
    return _grid_of(latent, len(indices)), [q for q in rows for _ in range(columns)], indices, rows, columns


def _grid_of(latent: dict[str, Any], count: int) -> dict[str, Any]:
    """A LATENT of `count` images, all of them the first of `latent`, with its mask and batch_index.

    Raises ValueError for what is no LATENT of a single part.
    """
    LATENT.check(latent)
    samples, mask = latent.get("samples"), latent.get("noise_mask")
    if not torch.is_tensor(samples) or samples.is_nested or not len(samples):
        raise ValueError("latent is empty or combines video and audio; connect a single image or video latent")
    indices = batch_index_of("latent", latent, len(samples))
    first = 0 if indices is None else int(indices[0])
    grid = {**latent, "samples": _repeat_first(samples, count), "batch_index": [first] * count}
    # The host takes the masks of a video for its frames, and gives them to every image of the batch.
    if mask is not None and not (samples.ndim == 5 and mask.ndim < 5):
        grid["noise_mask"] = _repeat_first(mask[None] if mask.ndim == 2 else mask, count)
    return grid


def _repeat_first(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor[:1].repeat(count, *[1] * (tensor.ndim - 1))

"""A sweep over density levels, and the labelled contact sheet of its images."""

import json
from collections.abc import Sequence

import torch
from comfy_api.latest import io

from .host.inputs import CATEGORY, Floats, Number, NumberText, Socket, Widget, schemas
from .host.sheet import contact_sheet

VALUES = NumberText(
    "values", "Numbers separated by commas, in the unit of what they are connected to.", default="0.05, 0.3, 0.5, 0.7, 0.95"
)
SIZE = Number(
    "picture_size",
    "Width of each image on the sheet. Images are resized without smoothing: whole multiples of their own size look best.",
    shown="image size",
    unit="pixels",
    default=192,
    low=32,
    high=2048,
)
COLUMN_LABEL = Widget(
    "column_label", "What differs between columns, written above each with its number.", default="seed", optional=True
)


class DensityLevels(io.ComfyNode):
    """Numbers in a text, one run for each or all in one."""

    INPUTS = (VALUES,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DensityLevels",
            display_name="Density Levels",
            category=CATEGORY,
            description="A list of levels for a sweep. Connect value to quantile or detail_shift: one run for each level. Or "
            "connect all_values to quantiles or detail_shifts: one run, a level for each image.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                io.Float.Output(display_name="value", is_output_list=True, tooltip="The numbers one by one: a run for each."),
                Floats.Output(
                    display_name="all_values", tooltip="All numbers at once: one for each image of a batch, in a single run."
                ),
            ],
        )

    @classmethod
    def execute(cls, values: str) -> io.NodeOutput:
        found = VALUES.check(values)
        return io.NodeOutput(found, found)


class DensityContactSheet(io.ComfyNode):
    """The images of a sweep on one IMAGE: see `host.sheet`."""

    INPUTS = (
        Socket("images", "The batches of the sweep, one for each level.", io.Image),
        Socket(
            "bits_per_dim",
            "-log2 p / D of each image, from Log-Density or Exact Log-Density: a list for each row, or one for all.",
            Floats,
            unlinked="no numbers",
        ),
        Socket("levels", "The levels of the sweep, which label the rows.", io.Float, unlinked="rows are numbered"),
        Widget("label", "What the levels are, written before each: q for quantiles, shift for shifts.", default="q"),
        SIZE,
        COLUMN_LABEL,
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DensityContactSheet",
            display_name="Density Contact Sheet",
            category=CATEGORY,
            description="Puts the images of a sweep on one labelled sheet: a row for each level, a column for each seed, the "
            "bits per dimension under each image.",
            inputs=schemas(cls.INPUTS),
            outputs=[io.Image.Output(display_name="image", tooltip="The contact sheet, for SaveImage.")],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        images: list[torch.Tensor],
        label: list[str],
        picture_size: list[int],
        bits_per_dim: list[list[float]] | None = None,
        levels: list[float] | None = None,
        column_label: Sequence[str] = (COLUMN_LABEL.default,),
    ) -> io.NodeOutput:
        size = SIZE.check(picture_size[0])
        sheet, table = contact_sheet(images, label[0], column_label[0], size, bits_per_dim, levels)
        return io.NodeOutput(sheet, ui={"table": [json.dumps(table)]})

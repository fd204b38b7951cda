"""A sweep over density levels, and the labelled contact sheet of its images."""

import itertools
import json
from collections.abc import Sequence

import numpy as np
import torch
from comfy.utils import common_upscale
from comfy_api.latest import io
from PIL import Image, ImageDraw, ImageFont

from .host.inputs import CATEGORY, Floats, Number, NumberText, Socket, Widget, schemas

MARGIN = 8
CAPTION = 22
HEADER = 30
ROW_LABEL = 90
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


class DensityLevels(io.ComfyNode):
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
                io.Float.Output(display_name="value", is_output_list=True, tooltip="One number after the other: a run each."),
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
        Widget("column_label", "What differs between columns, written above with the number.", default="seed", optional=True),
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
        column_label: Sequence[str] = ("seed",),
    ) -> io.NodeOutput:
        size = SIZE.check(picture_size[0])
        if bits_per_dim is not None and len(bits_per_dim) == 1 and len(bits_per_dim[0]) == sum(map(len, images)):
            numbers_left = iter(bits_per_dim[0])  # of a grid that was sampled as one batch
            bits_per_dim = [list(itertools.islice(numbers_left, len(batch))) for batch in images]
        for name, values in (("bits_per_dim", bits_per_dim), ("levels", levels)):
            if values is not None and len(values) != len(images):
                raise ValueError(f"{name} has {len(values)} rows and images has {len(images)}; connect both from one sweep")
        for i, batch in enumerate(images):
            if batch.shape[1:] != images[0].shape[1:]:
                raise ValueError(
                    f"images of row {i} are {tuple(batch.shape[1:])} and those of row 0 "
                    f"{tuple(images[0].shape[1:])}; a sheet takes images of one size"
                )
            if bits_per_dim is not None and len(bits_per_dim[i]) != len(batch):
                raise ValueError(
                    f"bits_per_dim has {len(bits_per_dim[i])} numbers in row {i} and images has "
                    f"{len(batch)}; connect the log-density of the same latents"
                )
        labels = [f"{label[0]} {v:g}" for v in levels] if levels else [f"row {i}" for i in range(len(images))]
        columns = [f"{column_label[0]} {i}" for i in range(max(map(len, images)))]
        table = {
            "columns": columns,
            "rows": [{"label": text, "bits_per_dim": bits} for text, bits in zip(labels, bits_per_dim or [])],
        }
        sheet = draw_sheet(images, labels, columns, bits_per_dim, size)
        return io.NodeOutput(sheet, ui={"table": [json.dumps(table)]})


def draw_sheet(
    rows: list[torch.Tensor], labels: list[str], columns: list[str], bits_per_dim: list[list[float]] | None, width: int
) -> torch.Tensor:
    """The contact sheet as an IMAGE (1, H, W, 3); rows: batches (B, H, W, 3) in [0, 1]."""
    height = round(width * rows[0].shape[1] / rows[0].shape[2])
    caption = CAPTION if bits_per_dim else 0
    sheet = Image.new(
        "RGB", (ROW_LABEL + len(columns) * (width + MARGIN), HEADER + len(rows) * (height + caption + MARGIN)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(16), ImageFont.load_default(14)
    for j, text in enumerate(columns):
        x = ROW_LABEL + j * (width + MARGIN)
        draw.text((x + width // 2, HEADER // 2), text, "black", font, anchor="mm")
    for i, (batch, text) in enumerate(zip(rows, labels)):
        y = HEADER + i * (height + caption + MARGIN)
        draw.text((MARGIN, y + height // 2), text, "black", font, anchor="lm")
        big = common_upscale(batch[..., :3].movedim(-1, 1), width, height, "nearest-exact", "disabled").movedim(1, -1)
        for j, image in enumerate(big):
            x = ROW_LABEL + j * (width + MARGIN)
            sheet.paste(Image.fromarray(np.uint8((image.cpu().numpy() * 255).clip(0, 255).round())), (x, y))
            if bits_per_dim:
                draw.text(
                    (x + width // 2, y + height + caption // 2),
                    f"{bits_per_dim[i][j]:.3f} bits/dim",
                    "black",
                    small,
                    anchor="mm",
                )
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]

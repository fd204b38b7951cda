"""A sweep over density levels, and the labelled contact sheet of its pictures."""

import itertools
import json

import numpy as np
import torch
from comfy.utils import common_upscale
from comfy_api.latest import io
from PIL import Image, ImageDraw, ImageFont

from .host.inputs import CATEGORY, Floats, numbers

MARGIN = 8
CAPTION = 22
HEADER = 30
ROW_LABEL = 90


class DensityLevels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DensityLevels",
            display_name="Density Levels",
            category=CATEGORY,
            description="A list of numbers. Connect value to the quantile or detail_shift of a guidance node, and that "
                        "runs once for each; connect all_values to its quantiles or detail_shifts for one level per "
                        "image.",
            inputs=[io.String.Input(
                "values", default="0.05, 0.3, 0.5, 0.7, 0.95",
                tooltip="Numbers separated by commas, for instance quantiles between 0.001 and 0.999.")],
            outputs=[
                io.Float.Output(display_name="value", is_output_list=True, tooltip="One number after the other."),
                Floats.Output(display_name="all_values",
                              tooltip="All numbers at once, for quantiles or detail_shifts of a guidance node: one for "
                                      "each image of a batch, in a single run."),
            ],
        )

    @classmethod
    def execute(cls, values):
        found = numbers("values", values)
        return io.NodeOutput(found, found)


class DensityContactSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DensityContactSheet",
            display_name="Density Contact Sheet",
            category=CATEGORY,
            description="Lays the pictures of a sweep out in a grid: a row for each level, a column for each seed, and "
                        "the bits per dimension under each picture.",
            inputs=[
                io.Image.Input("images", tooltip="The batches of the sweep, one for each level."),
                Floats.Input("bits_per_dim", optional=True,
                             tooltip="-log2 p / D of every picture, from a log-density node; one list for each row, or "
                                     "one for all. Not connected (neutral): no numbers."),
                io.Float.Input("levels", force_input=True, optional=True,
                               tooltip="The levels of the sweep, for the labels of the rows, in the unit of what was varied. "
                                       "Not connected (neutral): the rows' numbers."),
                io.String.Input("label", default="q", tooltip="What the levels are, written before each of them: q (default) "
                                                              "for quantiles."),
                io.Int.Input("picture_size", default=192, min=32, max=2048,
                             tooltip="Width of each picture on the sheet, in pixels. 192 is the default."),
                io.String.Input("column_label", default="seed", optional=True,
                                tooltip="What differs from column to column, written above each of them with its "
                                        "number: seed by default."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The contact sheet, for SaveImage.")],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, label, picture_size, bits_per_dim=None, levels=None, column_label=("seed",)):
        if bits_per_dim is not None and len(bits_per_dim) == 1 and len(bits_per_dim[0]) == sum(map(len, images)):
            numbers_left = iter(bits_per_dim[0])  # of a grid that was sampled as one batch
            bits_per_dim = [list(itertools.islice(numbers_left, len(batch))) for batch in images]
        for name, values in (("bits_per_dim", bits_per_dim), ("levels", levels)):
            if values is not None and len(values) != len(images):
                raise ValueError(f"{name} has {len(values)} rows and images has {len(images)}; connect the same sweep")
        for i, batch in enumerate(images):
            if batch.shape[1:] != images[0].shape[1:]:
                raise ValueError(f"images of row {i} are {tuple(batch.shape[1:])} and those of row 0 "
                                 f"{tuple(images[0].shape[1:])}; a sheet takes pictures of one size")
            if bits_per_dim is not None and len(bits_per_dim[i]) != len(batch):
                raise ValueError(f"bits_per_dim has {len(bits_per_dim[i])} numbers in row {i} and images has "
                                 f"{len(batch)} pictures; connect the log-density of the same latents")
        labels = [f"{label[0]} {v:g}" for v in levels] if levels else [f"row {i}" for i in range(len(images))]
        columns = [f"{column_label[0]} {i}" for i in range(max(map(len, images)))]
        table = {
            "columns": columns,
            "rows": [{"label": text, "bits_per_dim": bits} for text, bits in zip(labels, bits_per_dim or [])],
        }
        sheet = draw_sheet(images, labels, columns, bits_per_dim, picture_size[0])
        return io.NodeOutput(sheet, ui={"table": [json.dumps(table)]})


def draw_sheet(rows, labels, columns, bits_per_dim, width):
    """The contact sheet as an IMAGE (1, H, W, 3); rows: batches (B, H, W, 3) in [0, 1]."""
    height = round(width * rows[0].shape[1] / rows[0].shape[2])
    caption = CAPTION if bits_per_dim else 0
    sheet = Image.new("RGB", (
        ROW_LABEL + len(columns) * (width + MARGIN),
        HEADER + len(rows) * (height + caption + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(16), ImageFont.load_default(14)
    for j, text in enumerate(columns):
        x = ROW_LABEL + j * (width + MARGIN)
        draw.text((x + width // 2, HEADER // 2), text, "black", font, anchor="mm")
    for i, (batch, text) in enumerate(zip(rows, labels)):
        y = HEADER + i * (height + caption + MARGIN)
        draw.text((MARGIN, y + height // 2), text, "black", font, anchor="lm")
        big = common_upscale(batch[..., :3].movedim(-1, 1), width, height, "nearest-exact", "disabled").movedim(1, -1)
        for j, picture in enumerate(big):
            x = ROW_LABEL + j * (width + MARGIN)
            sheet.paste(Image.fromarray(np.uint8((picture.cpu().numpy() * 255).clip(0, 255).round())), (x, y))
            if caption:
                draw.text((x + width // 2, y + height + caption // 2), f"{bits_per_dim[i][j]:.3f} bits/dim", "black",
                          small, anchor="mm")
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]

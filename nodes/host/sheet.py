"""The labelled contact sheet of a sweep."""

import itertools
from typing import Any

import numpy as np
import torch
from comfy.utils import common_upscale
from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
CAPTION = 22
HEADER = 30
ROW_LABEL = 90


def contact_sheet(
    images: list[torch.Tensor],
    label: str,
    column_label: str,
    width: int,
    bits_per_dim: list[list[float]] | None = None,
    levels: list[float] | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """(the sheet as an IMAGE, its table: columns, and rows with their bits per dimension).

    images: a batch (B, H, W, 3) for each row. label, column_label: words before the levels and before the columns' numbers.
    width: of an image on the sheet, in pixels. bits_per_dim: a list for each row, or one for all.
    Raises ValueError, naming the input, where the lists do not fit the images.
    """
    if bits_per_dim is not None and len(bits_per_dim) == 1 and len(bits_per_dim[0]) == sum(map(len, images)):
        numbers_left = iter(bits_per_dim[0])  # of a grid that was sampled as one batch
        bits_per_dim = [list(itertools.islice(numbers_left, len(batch))) for batch in images]
    _check_rows(images, bits_per_dim, levels)
    labels = [f"{label} {v:g}" for v in levels] if levels else [f"row {i}" for i in range(len(images))]
    columns = [f"{column_label} {i}" for i in range(max(map(len, images)))]
    table = {
        "columns": columns,
        "rows": [{"label": text, "bits_per_dim": bits} for text, bits in zip(labels, bits_per_dim or [])],
    }
    return draw_sheet(images, labels, columns, bits_per_dim, width), table


def _check_rows(images: list[torch.Tensor], bits_per_dim: list[list[float]] | None, levels: list[float] | None) -> None:
    """Raise ValueError unless all images have one size, and both lists a row for each of theirs."""
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
                f"{len(batch)}; connect the readout of the same latents"
            )


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

"""Makes the pack's icon and banner for the registry, with the demo model.

    python3 run.py bench make_images

Three seeds from less detail to more, 7 : 3, in docs/banner.png; the ends of one of them, cut along the diagonal, in
docs/icon.png. Four minutes.
"""

import torch
from PIL import Image, ImageDraw

from ..nodes import DensityGuidanceSampler
from ..testing.demo_runs import Demo
from .pages import DOCS

SHIFTS = (-0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2)
SEEDS, STEPS, TILE = (1, 3, 2), 16, 180  # numbers of the seeds, top to bottom; pixels
ICON = 384  # six times the images' size; the registry takes 400 at most


def images(shift):
    """The demo model's images of `SEEDS` at one shift."""
    demo = Demo(max(SEEDS) + 1)
    samples = demo.run(lambda part: DensityGuidanceSampler.execute(0.5, shift, 0.0, 1.0, None)[0], STEPS).samples
    pixels = ((samples.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    return [Image.fromarray(pixels[seed]) for seed in SEEDS]


def banner(columns):
    sheet = Image.new("RGB", (len(columns) * TILE, len(SEEDS) * TILE))
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            sheet.paste(image.resize((TILE, TILE), Image.LANCZOS), (x * TILE, y * TILE))
    return sheet


def icon(less, more):
    """Below the diagonal with less detail, above it with more."""
    less, more = (image.resize((ICON, ICON), Image.NEAREST) for image in (less, more))
    corner = Image.new("L", more.size)
    ImageDraw.Draw(corner).polygon([(0, 0), (ICON, 0), (ICON, ICON)], fill=255)
    return Image.composite(more, less, corner)


def main():
    columns = [images(shift) for shift in SHIFTS]
    banner(columns).save(DOCS / "banner.png", optimize=True)
    icon(columns[0][2], columns[-1][2]).save(DOCS / "icon.png", optimize=True)

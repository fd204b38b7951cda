"""Collect the images that the demo model is trained on: `python training/demo_images.py public.zip pictures.safetensors`.

Data: the terrain textures of the game 0 A.D. (Wildfire Games, CC BY-SA 3.0), photographs of ground, in the file
`mods/public/public.zip` of the game or of Debian's package `0ad-data`. Needs Pillow, torch and safetensors; takes a minute.

Each texture is cut to a square of 256 pixels and keeps the class that its path tells. Every twelfth of a class is held
out, unless it is a training image in other colours, as many are: then it is left out altogether.
"""

import argparse
import io
import re
import zipfile

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file, save_file

FOLDER = "art/textures/terrain/types/"
SIZE = 256
MIN_CONTRAST = 4.0  # standard deviation of the grey levels: flat colours and masks are left out
HELD_OUT_EVERY = 12
ALIKE = 0.45  # correlation of whole grey images: variants of an image have 0.6 or more, different ones 0.3 at most
CROPS = (64, SIZE * 11 // 16)  # pixels of a side that `TrainingImages` shows, from and to

# class -> what a path says, in order of precedence
CLASSES = {
    "paving": "paving|road|tile|city|bridge",
    "snow": "snow|ice|polar",
    "rock": "cliff|rock|mountain|fissure|gravel|stone",
    "undergrowth": "forest|flora|shrub|litter",
    "grass": "grass|farm|steppe",
    "sand": "sand|beach|dune|desert|shore",
    "earth": "dirt|mud|clay|furrow|savanna",
}
_NO_IMAGE = re.compile("norm|spec|test|grid", re.IGNORECASE)


def class_of(name):
    """Index into CLASSES of a texture's path below FOLDER, or None."""
    return next((i for i, words in enumerate(CLASSES.values()) if re.search(words, name.lower())), None)


def read(archive):
    """(image (SIZE, SIZE, 3) uint8, class index) of every usable texture, in the order of their names; no doubles."""
    seen = set()
    for path in sorted(archive.namelist()):
        name = path.removeprefix(FOLDER)
        kind = class_of(name)
        if name == path or kind is None or _NO_IMAGE.search(name):
            continue
        try:
            image = Image.open(io.BytesIO(archive.read(path))).convert("RGB")
        except (UnidentifiedImageError, NotImplementedError):  # settings beside the textures; exotic compressions
            continue
        side = min(image.size)
        if side < SIZE:
            continue
        pixels = np.asarray(image.crop((0, 0, side, side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        if pixels.mean(2).std() < MIN_CONTRAST or pixels.tobytes() in seen:
            continue
        seen.add(pixels.tobytes())
        yield torch.from_numpy(pixels.copy()), kind


def likeness(images, others):
    """Highest correlation of each image (n, SIZE, SIZE, 3) with any of `others`, (n,): grey, any shift, mirrored or not."""

    def waves(colour):
        grey = torch.nn.functional.avg_pool2d(colour.float().mean(-1), 2)
        grey = grey - grey.mean((1, 2), keepdim=True)
        return torch.fft.rfft2(grey / grey.square().sum((1, 2), keepdim=True).sqrt())

    theirs = waves(others)
    return torch.stack(
        [torch.fft.irfft2(theirs * waves(torch.stack([one, one.flip(1)]))[:, None].conj()).max() for one in images]
    )


class TrainingImages:
    """Crops of the images, which repeat like tiles."""

    def __init__(self, path, held_out):
        data = load_file(path)
        chosen = data["held_out"] == held_out
        self.images = data["pictures"][chosen].permute(0, 3, 1, 2).contiguous()
        self.classes = data["classes"][chosen]

    def draw(self, count, size, generator):
        """(crops (count, 3, size, size) in [-1, 1], classes (count,)): every class as often, mirrored at random."""

        def uniform(n):
            return torch.randint(n, (count,), generator=generator).tolist()

        kinds = uniform(len(CLASSES))
        crops = []
        for kind, pick, side, row, column, mirrored in zip(
            kinds, uniform(2**31), uniform(CROPS[1] - CROPS[0] + 1), uniform(2**31), uniform(2**31), uniform(2)
        ):
            members = (self.classes == kind).nonzero()[:, 0]
            image = self.images[members[pick % len(members)]]
            side += CROPS[0]
            image = image.roll((row % SIZE, column % SIZE), (1, 2))[:, :side, :side].float()
            image = torch.nn.functional.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]
            crops.append(image.flip(2) if mirrored else image)
        return torch.stack(crops) / 127.5 - 1, torch.tensor(kinds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", help="public.zip of 0 A.D.")
    parser.add_argument("output", help="where the images go, a safetensors file")
    options = parser.parse_args()
    with zipfile.ZipFile(options.archive) as archive:
        images, kinds = zip(*read(archive))
    kinds = torch.tensor(kinds)
    within_class = torch.nn.functional.one_hot(kinds).cumsum(0).gather(1, kinds[:, None])[:, 0]
    held_out = within_class % HELD_OUT_EVERY == 0
    images = torch.stack(images)
    kept = torch.ones_like(held_out)
    kept[held_out] = likeness(images[held_out], images[~held_out]) < ALIKE
    images, kinds, held_out = images[kept], kinds[kept], held_out[kept]
    save_file({"pictures": images, "classes": kinds, "held_out": held_out}, options.output)
    for i, name in enumerate(CLASSES):
        print(f"{name}: {int((kinds == i).sum())} images, {int(((kinds == i) & held_out).sum())} of them held out")


if __name__ == "__main__":
    main()

"""Fit the exact-density model to the images of an emoji font and write `models/exact_density.safetensors`.

    python training/fit_exact_density.py NotoColorEmoji.ttf

Data: the bitmaps of Noto Color Emoji (SIL Open Font License 1.1), e.g. Debian's package `fonts-noto-color-emoji`.
Needs torch, scipy, Pillow, safetensors and fonttools; takes about a minute on two cores. The result depends on nothing
but the font file.

Each cluster of similar images becomes one component: its mean, its main directions of variation, and a texture
spectrum that all components share. Standard deviations are held within a range that every noise schedule of the host
resolves: the exact model is there to measure, and a measurement needs a truth that 32 steps can reach.
"""

import argparse
import importlib.util
import io
from pathlib import Path

import numpy as np
import torch
from fontTools.ttLib import TTFont
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("exact_density", ROOT / "dg_core" / "exact_density.py")
exact_density = importlib.util.module_from_spec(spec)
spec.loader.exec_module(exact_density)

SIZE = 64  # largest image
LOW = 32  # the factors cover the lowest 32 frequencies
CLUSTERS = 256
COMPONENTS = 128  # the clusters that their mean and main directions describe best
MIN_MEMBERS = 12
RANK = 12
SCALE = 8.0  # latent units per unit of an image in [-1, 1]
MIN_STD = 0.52  # of the texture, latent units at 32x32
MAX_STD = 4.0  # of a direction of variation, latent units at 32x32


def read_font(path):
    """Distinct bitmaps of the font on white, mirrored ones too: (N, 3, SIZE, SIZE) in [-1, 1]."""
    images, seen = [], set()
    for strike in TTFont(path)["CBDT"].strikeData:
        for _, glyph in sorted(strike.items()):
            data = getattr(glyph, "imageData", None)
            if data is None or data in seen:
                continue
            seen.add(data)
            bitmap = Image.open(io.BytesIO(data)).convert("RGBA")
            side = max(bitmap.size)
            square = Image.new("RGBA", (side, side), "white")
            square.alpha_composite(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
            images.append(np.asarray(square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double() / 127.5 - 1
    return torch.cat([x, x.flip(-1)])


def k_means(features, count, generator):
    """Cluster number of every row. Starts from k-means++; an empty cluster takes the worst-fitted row."""
    centres = features[torch.randint(len(features), (1,), generator=generator)]
    while len(centres) < count:
        distance = torch.cdist(features, centres).amin(1).square()
        centres = torch.cat([centres, features[torch.multinomial(distance, 1, generator=generator)]])
    for _ in range(60):
        distance, label = torch.cdist(features, centres).min(1)
        for k in range(count):
            members = features[label == k]
            centres[k] = members.mean(0) if len(members) else features[distance.argmax()]
    return label


def fit(c, generator):
    """Tables of `ExactDensity` for DCT coefficients c (N, 3, SIZE, SIZE), latent units."""
    label = k_means(c[..., :16, :16].flatten(1), CLUSTERS, generator)
    # A DCT coefficient at 64x64 is twice that at 32x32.
    grow = SIZE / LOW
    index = exact_density.band_index(SIZE)
    bands = int(index.max()) + 1
    fits = []
    for k in range(CLUSTERS):
        members = c[label == k]
        n = len(members)
        if n < MIN_MEMBERS:
            continue
        mean = members.mean(0)
        rest = members - mean
        low = rest[..., :LOW, :LOW].flatten(1)
        _, value, direction = torch.linalg.svd(low, full_matrices=False)
        # Few images say little about many directions.
        rank = min(RANK, n // 2)
        std = torch.zeros(RANK, dtype=torch.float64)
        std[:rank] = (value[:rank] / (n - 1) ** 0.5).clamp(max=grow * MAX_STD)
        factor = torch.zeros(RANK, low.shape[1], dtype=torch.float64)
        factor[:rank] = std[:rank, None] * direction[:rank]
        rest[..., :LOW, :LOW] -= (low @ direction[:rank].T @ direction[:rank]).view(n, 3, LOW, LOW)
        energy = torch.zeros(bands, dtype=torch.float64).index_add_(0, index.flatten(), rest.square().sum(0).flatten())
        fits.append((energy.sum() / n, n, mean, factor.view(RANK, 3, LOW, LOW), energy, n - 1 - rank))
    _, counts, means, factors, energies, freedom = zip(*sorted(fits, key=lambda f: float(f[0]))[:COMPONENTS])

    # Half of the left-over energy: the other half is edges, which no stationary texture can draw.
    count = torch.bincount(index.flatten(), minlength=bands)
    band_variance = 0.5 * sum(energies) / (sum(freedom) * count)
    floor = torch.full((bands,), MIN_STD**2, dtype=torch.float64)
    floor[exact_density.band_index(LOW).unique()] *= grow**2
    weights = torch.tensor(counts, dtype=torch.float64)
    return {
        "log_weights": (weights / weights.sum()).log(),
        "means": torch.stack(means).half(),
        "factors": torch.stack(factors).half(),
        "band_variance": torch.maximum(band_variance, floor),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("font", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "models" / "exact_density.safetensors")
    args = parser.parse_args()

    images = read_font(args.font)
    shift = images.mean((0, 2, 3))
    tables = fit(exact_density.dct((images - shift[:, None, None]) * SCALE), torch.Generator().manual_seed(0))
    tables["shift"] = shift
    tables["scale"] = torch.tensor(SCALE, dtype=torch.float64)
    save_file(
        tables,
        args.output,
        metadata={
            "data": "Noto Color Emoji, Copyright Google Inc., SIL Open Font License 1.1",
            "script": "training/fit_exact_density.py",
        },
    )
    print(f"{len(images)} images, {COMPONENTS} components, {args.output.stat().st_size / 1e6:.1f} MB -> {args.output}")


if __name__ == "__main__":
    main()

"""How good is the demo model: its loss on images that it was not trained on, and whether it repeats those that it was.

    python3 run.py bench demo_model

Needs the images of training/demo_images.py in .host/data/. Writes docs/demo_model.json and
.png. Ten minutes on one core.
"""

import json
import math

import numpy as np
import torch
from tqdm import tqdm

from ..dg_core.schedule import log_snr
from ..launcher.environment import PACK
from ..nodes import DensityGuidanceSampler
from ..nodes.builtin import demo as demo_model
from ..testing.demo_runs import IMAGES, Demo, require_images
from ..testing.figures import figure
from ..training.demo_images import CROPS, SIZE, TrainingImages
from .pages import DOCS, publish

LEVELS, CROPS_PER_LEVEL = 12, 64
QUERIES, STEPS = 21, 32  # images looked up of each kind, sampling steps
SIDES = np.geomspace(*CROPS, 12)  # scales of the training images: each differs by 5% at most from one of these
PATCH = 40  # pixels of the middle that are looked up: less would be found anywhere, more nowhere at another scale
SHOWN = 7


def loss_over_noise(demo):
    """Loss of v at noise levels from least to most: {"log_snr": ..., "training": ..., "held_out": ...}, and the errors.

    v's error is that of the denoised image times sqrt(1 + s^2) / s. Both kinds of images get the same noises.
    """
    sigmas = demo.model.get_model_object("model_sampling").sigmas
    thetas = torch.linspace(float(sigmas[0].atan()), float(sigmas[-1].atan()), LEVELS)
    chosen = sigmas[torch.searchsorted(sigmas.atan(), thetas).clamp(max=len(sigmas) - 1)].tolist()
    rows = {"log_snr": [log_snr(s) for s in chosen]}
    for name, held_out in (("training", False), ("held_out", True)):
        generator = torch.Generator().manual_seed(3)
        drawn, kinds = TrainingImages(IMAGES, held_out).draw(CROPS_PER_LEVEL, demo_model.SIZE, generator)
        latents, noise = drawn * demo_model.SCALE, torch.randn(drawn.shape, generator=torch.Generator().manual_seed(4))
        rows[name], rows[f"{name}_error"] = [], []
        for s in tqdm(chosen, f"loss, {name}"):
            denoised = demo.denoised(latents + s * noise, s, kinds)
            losses = (denoised - latents).square().mean((1, 2, 3)) * (1 + s**2) / s**2
            rows[name].append(float(losses.mean()))
            rows[f"{name}_error"].append(float(losses.std()) / math.sqrt(CROPS_PER_LEVEL))
    return rows


def grey(images):
    """(n, 3, H, W) -> (n, H, W)"""
    return images.float().mean(1)


def correlations(queries, image):
    """Normalised correlation of grey images (n, h, h) with every crop of one that repeats like a tile, (n, size, size)."""
    size, count = image.shape[-1], queries[0].numel()
    queries = queries - queries.mean((1, 2), keepdim=True)
    box = torch.fft.rfft2(torch.ones_like(queries[:1]), (size, size)).conj()

    def window_sum(values):
        return torch.fft.irfft2(torch.fft.rfft2(values)[None] * box, (size, size))

    image = image - image.mean()
    energy = window_sum(image.square()) - window_sum(image).square() / count
    products = torch.fft.irfft2(torch.fft.rfft2(image) * torch.fft.rfft2(queries, (size, size)).conj(), (size, size))
    norms = queries.square().sum((1, 2)).sqrt()[:, None, None] * energy.clamp(min=1e-3 * count).sqrt()
    return products / norms


def nearest(queries, images):
    """The training crop most like the middle of each image, at every place, mirrored or not, at several scales.

    queries: (n, 3, h, h); images: (m, 3, SIZE, SIZE) uint8. Returns (correlations (n,), crops (n, 3, h, h) in [-1, 1]).
    """
    h = queries.shape[-1]
    edge = (h - PATCH) // 2
    both = torch.cat([grey(queries), grey(queries.flip(3))])[:, edge : edge + PATCH, edge : edge + PATCH]
    best, crops = torch.full((len(queries),), -1.0), torch.zeros_like(queries)
    for image in tqdm(images, "nearest training images"):
        for side in SIDES:
            size = round(SIZE * h / side)
            small = (
                torch.nn.functional.interpolate(image[None].float(), (size, size), mode="bilinear", antialias=True)[0] / 127.5
                - 1
            )
            found = correlations(both, small.mean(0)).flatten(1)
            values, places = found.max(1)
            values, places = values.view(2, -1), places.view(2, -1)
            mirrored = values.argmax(0)
            for i in (values.amax(0) > best).nonzero()[:, 0].tolist():
                row, column = divmod(int(places[mirrored[i], i]), size)
                crop = small.roll((edge - row, edge - column), (1, 2))[:, :h, :h]
                best[i], crops[i] = values[mirrored[i], i], crop.flip(2) if mirrored[i] else crop
    return best, crops


def measure():
    """(results, images to show)."""
    demo = Demo(QUERIES)
    sampled = demo.run(lambda _: DensityGuidanceSampler.execute(0.5, 0.0, 0.0, 1.0)[0], STEPS).samples.clamp(-1, 1)
    with torch.inference_mode():
        loss = loss_over_noise(demo)
    training, held_out = TrainingImages(IMAGES, False), TrainingImages(IMAGES, True)
    looked_up = {
        "samples": sampled,
        "held-out images": held_out.draw(QUERIES, demo_model.SIZE, torch.Generator().manual_seed(5))[0],
        "training images": training.draw(QUERIES, demo_model.SIZE, torch.Generator().manual_seed(6))[0],
    }
    found, crop = nearest(torch.cat(list(looked_up.values())), training.images)
    results = {
        "loss": loss,
        "steps": STEPS,
        "queries": QUERIES,
        "training_images": len(training.images),
        "held_out_images": len(held_out.images),
        "nearest": dict(zip(looked_up, [v.tolist() for v in found.split(QUERIES)])),
        "training": json.loads((PACK / "training" / "demo_model.json").read_text()),
    }
    return results, torch.stack([sampled[:SHOWN], crop[:SHOWN]])


def plot(results, images):
    """images: (2, n, 3, H, W), samples and their nearest training crops."""
    record, loss = results["training"], results["loss"]
    mosaic = [["curve", "levels"], ["sheet", "sheet"]]
    with figure(DOCS / "demo_model.png", mosaic, figsize=(10, 7)) as (_, axes):
        curve, levels, sheet = (axes[name] for name in ("curve", "levels", "sheet"))
        curve.plot(*zip(*record["loss"]), label="training")
        curve.plot(
            [row[0] for row in record["held_out"]],
            [np.mean(row[1:]) for row in record["held_out"]],
            label="held out, averaged weights",
        )
        curve.set_xlabel("training step")
        for name, label in (("training", "training images"), ("held_out", "held-out images")):
            levels.errorbar(loss["log_snr"], loss[name], loss[f"{name}_error"], label=label)
        levels.set_xlabel("log-SNR")
        for axis in (curve, levels):
            axis.set_yscale("log")
            axis.set_ylabel("loss of v")
            axis.legend()
        rows = [torch.cat(list(row), 2) for row in images]
        sheet.imshow(((torch.cat(rows, 1).movedim(0, 2) + 1) / 2).clamp(0, 1).numpy())
        sheet.set_axis_off()
        sheet.set_title(
            "samples, and the training crop most like each: "
            + ", ".join(f"{v:.2f}" for v in results["nearest"]["samples"][: images.shape[1]])
        )


def main():
    require_images()
    results, images = measure()
    publish("demo_model", results)
    plot(results, images)

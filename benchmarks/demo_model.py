"""How good is the demo model: its loss on pictures that it was not trained on, and whether it repeats those that it was.

    python3 run.py bench demo_model

Needs the pictures of training/demo_pictures.py in .host/data/. Writes docs/demo_model.json and from it docs/demo_model.md
and .png. Ten minutes on one core.
"""

import json
import math

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from ..dg_core.schedule import log_snr
from ..launcher.environment import PACK
from ..nodes import DensityGuidanceSampler
from ..nodes.builtin import demo as demo_model
from ..training.demo_pictures import CROPS, SIZE, Pictures
from ..testing.demo_runs import PICTURES, Demo, require_pictures

DOCS = PACK / "docs"
LEVELS, CROPS_PER_LEVEL = 12, 64
QUERIES, STEPS = 21, 32  # pictures looked up of each kind, sampling steps
SIDES = np.geomspace(*CROPS, 12)  # scales of the training pictures: each differs by 5% at most from one of these
PATCH = 40  # pixels of the middle that are looked up: less would be found anywhere, more nowhere at another scale
SHOWN = 7


def loss_over_noise(demo, levels, count):
    """Loss of v at noise levels from least to most: {"log_snr": ..., "training": ..., "held_out": ...}, and the errors.

    v's error is that of the denoised picture times sqrt(1 + s^2) / s. Both kinds of pictures get the same noises.
    """
    sigmas = demo.model.get_model_object("model_sampling").sigmas
    thetas = torch.linspace(float(sigmas[0].atan()), float(sigmas[-1].atan()), levels)
    chosen = sigmas[torch.searchsorted(sigmas.atan(), thetas).clamp(max=len(sigmas) - 1)].tolist()
    rows = {"log_snr": [log_snr(s) for s in chosen]}
    for name, held_out in (("training", False), ("held_out", True)):
        generator = torch.Generator().manual_seed(3)
        drawn, kinds = Pictures(PICTURES, held_out).draw(count, demo_model.SIZE, generator)
        latents, noise = drawn * demo_model.SCALE, torch.randn(drawn.shape, generator=torch.Generator().manual_seed(4))
        rows[name], rows[f"{name}_error"] = [], []
        for s in tqdm(chosen, f"loss, {name}"):
            denoised = demo.denoised(latents + s * noise, s, kinds)
            losses = (denoised - latents).square().mean((1, 2, 3)) * (1 + s**2) / s**2
            rows[name].append(float(losses.mean()))
            rows[f"{name}_error"].append(float(losses.std()) / math.sqrt(count))
    return rows


def grey(pictures):
    """(n, 3, H, W) -> (n, H, W)"""
    return pictures.float().mean(1)


def correlations(queries, picture):
    """Normalised correlation of grey pictures (n, h, h) with every crop of one that repeats like a tile, (n, size, size)."""
    size, count = picture.shape[-1], queries[0].numel()
    queries = queries - queries.mean((1, 2), keepdim=True)
    box = torch.fft.rfft2(torch.ones_like(queries[:1]), (size, size)).conj()

    def window_sum(values):
        return torch.fft.irfft2(torch.fft.rfft2(values)[None] * box, (size, size))

    picture = picture - picture.mean()
    energy = window_sum(picture.square()) - window_sum(picture).square() / count
    products = torch.fft.irfft2(torch.fft.rfft2(picture) * torch.fft.rfft2(queries, (size, size)).conj(), (size, size))
    norms = queries.square().sum((1, 2)).sqrt()[:, None, None] * energy.clamp(min=1e-3 * count).sqrt()
    return products / norms


def nearest(queries, pictures, sides=SIDES, patch=PATCH):
    """The training crop most like the middle of each picture, at every place, mirrored or not, at several scales.

    queries: (n, 3, h, h); pictures: (m, 3, SIZE, SIZE) uint8. Returns (correlations (n,), crops (n, 3, h, h) in [-1, 1]).
    """
    h = queries.shape[-1]
    edge = (h - patch) // 2
    both = torch.cat([grey(queries), grey(queries.flip(3))])[:, edge:edge + patch, edge:edge + patch]
    best, crops = torch.full((len(queries),), -1.0), torch.zeros_like(queries)
    for picture in tqdm(pictures, "nearest training pictures"):
        for side in sides:
            size = round(SIZE * h / side)
            small = torch.nn.functional.interpolate(
                picture[None].float(), (size, size), mode="bilinear", antialias=True)[0] / 127.5 - 1
            found = correlations(both, small.mean(0)).flatten(1)
            values, places = found.max(1)
            values, places = values.view(2, -1), places.view(2, -1)
            mirrored = values.argmax(0)
            for i in (values.amax(0) > best).nonzero()[:, 0].tolist():
                row, column = divmod(int(places[mirrored[i], i]), size)
                crop = small.roll((edge - row, edge - column), (1, 2))[:, :h, :h]
                best[i], crops[i] = values[mirrored[i], i], crop.flip(2) if mirrored[i] else crop
    return best, crops


def measure(levels=LEVELS, crops=CROPS_PER_LEVEL, queries=QUERIES, steps=STEPS, searched=None):
    """(results, pictures to show). searched: so many training pictures at most."""
    demo = Demo(queries)
    sampled = demo.run(lambda _: DensityGuidanceSampler.execute(0.5, 0.0, 0.0, 1.0)[0], steps).samples.clamp(-1, 1)
    with torch.inference_mode():
        loss = loss_over_noise(demo, levels, crops)
    training, held_out = Pictures(PICTURES, False), Pictures(PICTURES, True)
    looked_up = {
        "samples": sampled, "held-out pictures": held_out.draw(
            queries, demo_model.SIZE, torch.Generator().manual_seed(5))[0],
        "training pictures": training.draw(queries, demo_model.SIZE, torch.Generator().manual_seed(6))[0]}
    found, crop = nearest(torch.cat(list(looked_up.values())), training.pictures[:searched])
    results = {"loss": loss, "steps": steps, "queries": queries, "training_pictures": len(training.pictures[:searched]),
               "held_out_pictures": len(held_out.pictures),
               "nearest": dict(zip(looked_up, [v.tolist() for v in found.split(queries)])),
               "training": json.loads((PACK / "training" / "demo_model.json").read_text())}
    shown = min(SHOWN, queries)
    return results, torch.stack([sampled[:shown], crop[:shown]])


def tables(results):
    """The markdown of a result: (loss, nearest pictures)."""
    loss = results["loss"]
    rows = ["| log-SNR | loss, training pictures | loss, held-out pictures |", "|---|---|---|"]
    rows += [f"| {x:.1f} | {a:.4f} ± {ae:.4f} | {b:.4f} ± {be:.4f} |" for x, a, ae, b, be in zip(*(
        loss[k] for k in ("log_snr", "training", "training_error", "held_out", "held_out_error")))]
    near = ["| looked up | median | largest |", "|---|---|---|"]
    near += [f"| {name} | {np.median(v):.2f} | {max(v):.2f} |" for name, v in results["nearest"].items()]
    return "\n".join(rows), "\n".join(near)


def page(results):
    loss, near = tables(results)
    record = results["training"]
    config = record["config"]
    return f"""# The demo model, measured

Made by `python3 run.py bench demo_model` from [demo_model.json](demo_model.json).

Trained by `training/train_demo_model.py --config {config["name"]}`: {record["parameters"] / 1e6:.1f} million parameters, \
{config["steps"]} steps of
{config["batch"]} pictures, {record["seconds"] / 60:.0f} minutes on {record["machine"]}. The loss of the last part of the \
training is {record["loss"][-1][1]:.4f}. {record["note"]}

## Loss over the noise

Mean squared error of v on crops of pictures that it was trained on, and of the {results["held_out_pictures"]} held out, \
with standard
errors over the crops, which are too small where crops of one picture are alike; the same noises for both.

{loss}

## Does it repeat the training pictures?

For {results["queries"]} pictures of each kind, the highest normalised correlation of their grey values with any crop of \
the {results["training_pictures"]}
training pictures: the {PATCH} x {PATCH} pixels of their middle, at every place, mirrored or not, at {len(SIDES)} scales. \
A training
picture finds itself, if not quite at its own scale; a copy would, too. Held-out pictures show how alike different pictures
of ground are.

{near}

![Training, loss over the noise, and samples above their nearest training crops](demo_model.png)
"""


def plot(results, pictures, path):
    """pictures: (2, n, 3, H, W), samples and their nearest training crops."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    curve, levels, sheet = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, :])
    record, loss = results["training"], results["loss"]
    curve.plot(*zip(*record["loss"]), label="training")
    steps = [row[0] for row in record["held_out"]]
    curve.plot(steps, [np.mean(row[1:]) for row in record["held_out"]], label="held out, averaged weights")
    curve.set_xlabel("training step")
    for name, label in (("training", "training pictures"), ("held_out", "held-out pictures")):
        levels.errorbar(loss["log_snr"], loss[name], loss[f"{name}_error"], label=label)
    levels.set_xlabel("log-SNR")
    for axis in (curve, levels):
        axis.set_yscale("log")
        axis.set_ylabel("loss of v")
        axis.legend()
    rows = [torch.cat(list(row), 2) for row in pictures]
    sheet.imshow(((torch.cat(rows, 1).movedim(0, 2) + 1) / 2).clamp(0, 1).numpy())
    sheet.set_axis_off()
    sheet.set_title("samples, and the training crop most like each: "
                    + ", ".join(f"{v:.2f}" for v in results["nearest"]["samples"][:pictures.shape[1]]))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    require_pictures()
    results, pictures = measure()
    (DOCS / "demo_model.json").write_text(json.dumps(results, indent=1) + "\n")
    (DOCS / "demo_model.md").write_text(page(results))
    plot(results, pictures, DOCS / "demo_model.png")

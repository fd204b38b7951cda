"""Inputs that several nodes share, and the category."""

import math

import torch
from comfy_api.latest import io

CATEGORY = "sampling/density guidance"
Floats = io.Custom("FLOATS")
SEEDS = 0, 0xFFFFFFFFFFFFFFFF
PROBES = 1, 64  # of the divergence, at each model evaluation


def require(name, value, attribute, hint):
    """Return `value`; raise ValueError, naming the input, unless it has `attribute`."""
    if not hasattr(value, attribute):
        raise ValueError(f"{name} is a {type(value).__name__}; connect {hint}")
    return value


def samples_of(name, latent):
    """The tensor of a LATENT input (several in one for video with audio); raises ValueError, naming the input, for others."""
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not (torch.is_tensor(samples) or getattr(samples, "is_nested", False)):
        raise ValueError(f"{name} is a {type(latent).__name__} without samples; connect a LATENT, for instance of VAEEncode, of "
                         "an empty latent or of a sampler")
    return samples


def batch_index_of(name, latent, count):
    """The batch_index of a LATENT input of `count` images, None where it has none; raises ValueError, naming the input,
    unless it numbers every image."""
    indices = latent.get("batch_index")
    if indices is not None and len(indices) != count:
        raise ValueError(f"{name} has {count} images and a batch_index for {len(indices)}; it must number every image: "
                         "LatentFromBatch keeps the two together")
    return indices


def sigmas_of(values):
    """SIGMAS as a list of floats; raises ValueError for what is no row of numbers."""
    if not torch.is_tensor(values) or values.ndim != 1:
        shape = f"of shape {tuple(values.shape)}" if torch.is_tensor(values) else f"a {type(values).__name__}"
        raise ValueError(f"sigmas are {shape}; connect SIGMAS, a row of noise levels, for instance of BasicScheduler")
    return values.tolist()


def floats(name, values):
    """A FLOATS input as a tuple, None as None; raises ValueError, naming the input, unless it is a list with a number."""
    if values is None:
        return None
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"{name} is {values!r}; connect a list with a number for each image, for instance the "
                         "all_values of DensityLevels")
    return tuple(values)


def numbers(name, text):
    """The numbers of a text, separated by commas or lines; raises ValueError, naming the input, where there are none."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r}; write numbers separated by commas, like 0.05, 0.5, 0.95")
    found = []
    for word in text.replace("\n", ",").split(","):
        if not word.strip():
            continue
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{name} has {word.strip()!r}; write numbers separated by commas, like 0.05, 0.5, 0.95")
        found.append(number)
    if not found:
        raise ValueError(f"{name} is empty; write numbers separated by commas, like 0.05, 0.5, 0.95")
    return found


def per_image_inputs():
    """quantiles and detail_shifts, one number for each image of the batch."""
    return [
        Floats.Input(
            "quantiles", optional=True,
            tooltip="Quantiles q, one for each image of the batch, in the place of quantile; a single number goes to all. "
                    "No unit, 0.5 is neutral. Not connected (neutral): quantile."),
        Floats.Input(
            "detail_shifts", optional=True,
            tooltip="Shifts in bits per dimension (-log2 p / D), one for each image of the batch, in the place of "
                    "detail_shift; a single number goes to all. 0 is neutral. Not connected (neutral): detail_shift."),
    ]


def mask_of(value):
    """A MASK input as a tensor (N, height, width), None as None; raises ValueError unless its numbers are from 0 to 1."""
    if value is None:
        return None
    if not torch.is_tensor(value) or value.ndim < 2 or not value.numel():
        shape = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
        raise ValueError(f"mask is {shape}; connect a MASK: (number of masks, height, width)")
    low, high = value.min().item(), value.max().item()
    if not (0 <= low and high <= 1):
        raise ValueError(f"mask has numbers from {low:g} to {high:g}; they must be from 0 to 1")
    return value.reshape(-1, *value.shape[-2:])


def mask_input():
    """mask: where guidance acts."""
    return io.Mask.Input(
        "mask", optional=True,
        tooltip="Where the node acts and how strongly, w from 0 to 1: any size, soft edges, one mask for all or one per image "
                "(per frame of a video). quantile and detail_shift then count this region. No unit. Not connected (neutral): "
                "everywhere.")


def curve_input():
    """curve: when guidance acts."""
    return Floats.Input(
        "curve", optional=True,
        tooltip="How the strength is spread over the guided part of the sampling: numbers from its beginning to its end, "
                "evenly spaced in log-SNR. No unit: only their ratios count, and the whole shift stays the same. The node "
                "shows it as a plot. Not connected (neutral): evenly.")


def guidance_inputs():
    """quantile, detail_shift, start_percent, end_percent."""
    return [
        *level_inputs(),
        io.Float.Input(
            "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, round=0.001,
            tooltip="Share of the sampling at which guidance begins. 0 (neutral) is pure noise. Guidance late in the "
                    "sampling changes texture only."),
        io.Float.Input(
            "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001,
            tooltip="Share of the sampling at which guidance ends. 1 (neutral) is the finished image. The last step to "
                    "zero noise is never guided."),
    ]


def level_inputs():
    """quantile and detail_shift."""
    return [
        io.Float.Input(
            "quantile", default=0.5, min=0.001, max=0.999, step=0.01, round=0.001,
            tooltip="How typical the image should be, as a quantile q of the rate at which log-density changes. "
                    "0.5 is neutral; below 0.5 gives more detail, above 0.5 a smoother image. No unit."),
        io.Float.Input(
            "detail_shift", default=0.0, min=-2.0, max=2.0, step=0.05, round=0.001,
            tooltip="Extra detail in bits per dimension (-log2 p / D), added to what the quantile gives. 0 is neutral; "
                    "positive gives more detail. Means the same amount at every resolution. A short guided range allows "
                    "only a small shift."),
    ]

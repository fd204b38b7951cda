"""What a score alignment check found, in words and as a plot."""

import math
from typing import Any

import numpy as np
import torch

from ...dg_core.alignment import SCALE_RANGE, lost_at
from .alignment_run import ENOUGH_STEPS, Check, CheckSettings, examine, finished_latent
from .plots import figure_image

ROWS = 8  # of the profile in the report
GAP = 0.1  # of the cosines of both ways, above what few steps and probes leave on a model that is a score
LEGEND = 8  # images with a label of their own in the plot


def score_alignment(
    guider: Any, noise: Any, latent: dict[str, Any], sigmas: torch.Tensor, settings: CheckSettings, sampler: Any
) -> tuple[bool, float, str, torch.Tensor, dict[str, Any], float, list[float]]:
    """(aligned, smallest cosine, report, plot as an IMAGE, finished LATENT, noise scale, response): what the node gives."""
    check = examine(guider, noise, latent, sigmas, settings, sampler)
    return (
        check.aligned,
        float(torch.nan_to_num(check.final_cosine, nan=-1.0).min()),
        text(check, settings),
        plot(check),
        finished_latent(latent, check.samples),
        check.common_scale(settings.detail_shift),
        check.response.tolist(),
    )


def verdict(check: Check) -> str:
    """One sentence."""
    good = check.final_cosine > 0
    if not check.final_cosine.isfinite().all():
        return "No verdict: the model returned NaN or infinity."
    if good.all():
        return "Aligned: less noise makes smoother images, more noise more detailed ones."
    if not good.any():
        return "Not aligned: use density guidance, not scaling."
    return f"Not aligned for image {_images(~good)}: use density guidance, not scaling."


def text(check: Check, settings: CheckSettings) -> str:
    """The report: verdict, numbers of each image, profile, cost, advice."""
    lines = [verdict(check), ""]
    scales, response = check.scales(settings.detail_shift), check.response
    for i, cosine in enumerate(check.final_cosine.tolist()):
        lines.append(
            f"image {i}: cosine {cosine:+.3f}; 1% more noise changes the image by {response[i]:+.5f} bits per "
            "dimension; " + _scale_words(settings.detail_shift, float(scales[i]))
        )
    if len(check.cosines) == 2:
        a, b = (c[-1] for c in check.cosines.values())
        gap = float((a - b).abs().max())
        lines.append(
            f"with and without the score: cosines differ by at most {gap:.3f}"
            + (
                ""
                if gap < GAP
                else ": too few steps or probes, or the prediction is not the score of its own flow's "
                "density, as with a strong CFG; then only the number without the score tells about that density"
            )
        )
    for name, cosine in check.cosines.items():
        for i, node in enumerate(lost_at(cosine).tolist()):
            if node >= 0:
                lines.append(
                    f"image {i}, {name}: alignment is lost at log-SNR {check.log_snr[node]:+.2f} "
                    f"(sigma {check.sigmas[node]:.4g})"
                )
        lines += ["", f"cosine, {name}:", *_profile(check, cosine)]
    lines += [
        "",
        f"read at sigma {check.sigmas[-1]:.4g}, log-SNR {check.log_snr[-1]:+.2f}, of {check.dim} numbers for each image",
        f"derivatives: {check.derivatives}",
        f"cost: {check.calls} model calls for each image"
        + (f", {check.dual_calls} of them in forward mode, at about twice the price" if check.dual_calls else "")
        + f"; plain sampling takes {check.plain_calls}",
    ]
    if check.stochastic:
        lines.append(
            f"{check.stochastic} adds noise of its own at every step, which is not scaled: scaling the starting noise alone "
            "does little with it. Connect a deterministic sampler to check the model"
        )
    if check.steps < ENOUGH_STEPS:
        lines.append(
            f"only {check.steps} steps: an image that changes early in the run may get a wrong number; "
            f"use {ENOUGH_STEPS} or more"
        )
    if not check.aligned:
        lines += [
            "",
            "What to do: scaling the noise (Prior Guidance) does not change the detail of these images "
            "steadily. Use Density Guidance Sampler, which steers the log-density along the whole run.",
        ]
    return "\n".join(lines)


def _scale_words(shift: float, scale: float) -> str:
    if math.isnan(scale):
        return "no scale: not aligned"
    end = ", the limit: the wanted shift is out of reach" if scale in SCALE_RANGE else ""
    return f"noise scale {scale:.4f} for {shift:+g} bits per dimension{end}"


def _profile(check: Check, cosine: torch.Tensor) -> list[str]:
    rows = sorted({round(i) for i in np.linspace(0, len(cosine) - 1, ROWS)})
    return [f"  log-SNR {check.log_snr[i]:+6.2f}: " + " ".join(f"{v:+.3f}" for v in cosine[i].tolist()) for i in rows]


def _images(chosen: torch.Tensor) -> str:
    return ", ".join(str(i) for i in torch.nonzero(chosen)[:, 0].tolist())


def plot(check: Check) -> torch.Tensor:
    """Cosine against log-SNR as an IMAGE (1, H, W, 3), see `figure_image`."""
    return figure_image(lambda figure: _draw(check, figure.add_subplot()))


def _draw(check: Check, axes: Any) -> None:
    axes.axhspan(-1.05, 0, color="tab:red", alpha=0.08)
    axes.axhline(0, color="black", linewidth=0.8)
    shown = [i for i, v in enumerate(check.log_snr) if math.isfinite(v)]
    x = [check.log_snr[i] for i in shown]
    for cosine, style in zip(check.cosines.values(), ("-", "--")):
        for i, line in enumerate(cosine[shown].T.tolist()):
            axes.plot(
                x,
                line,
                style,
                marker="o" if len(x) == 1 else None,
                color=f"C{i % 10}",
                label=f"image {i}" if style == "-" and i < LEGEND else None,
            )
    if len(check.cosines) == 2:
        axes.plot([], [], "-", color="grey", label="with score")
        axes.plot([], [], "--", color="grey", label="without score")
    if len(x) == 1:
        axes.set_xlim(x[0] - 5, x[0] + 1)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xlabel("log-SNR (noise on the left, image on the right)")
    axes.set_ylabel("cosine: above 0, scaling works")
    axes.set_title(verdict(check), fontsize=11, color="darkgreen" if check.aligned else "darkred", wrap=True)
    axes.legend(loc="lower left", fontsize=8)

"""Curves as an IMAGE of the host."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ...dg_core.control import strength_curve

SIZE = (7.0, 4.5)  # inches
CURVE_SIZE = (3.6, 2.4)  # inches; shown in a node
DPI = 100
PANEL_HEIGHT = 2.6  # inches, where there are several


def figure_image(draw: Callable[[Any], None], size: tuple[float, float] = SIZE) -> torch.Tensor:
    """What draw(figure) draws on a matplotlib figure of `size` (width, height) inches, as an IMAGE (1, H, W, 3).

    A `blank_image`, and a warning in the log, where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logging.warning("Density guidance: matplotlib is not installed, plots stay blank (pip install matplotlib)")
        return blank_image(size)
    # Not pyplot: it keeps figures in a global list, and nodes run in a thread of their own.
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]


def curves_image(
    panels: dict[str, np.ndarray], x_label: str, x: Sequence[float] | np.ndarray, labels: Sequence[str] | None = None
) -> torch.Tensor:
    """An IMAGE (1, H, W, 3) with one panel above the other: {y label: (n, B) array} against x (n,).

    labels: names of the B curves, for a legend. See `figure_image`.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (label, values) in zip(axes, panels.items()):
            axis.plot(x, values, marker=".", linewidth=1)
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[-1].set_xlabel(x_label)
        if labels and len(labels) <= 10:
            axes[0].legend(labels, fontsize="small")

    return figure_image(draw, SIZE if len(panels) == 1 else (SIZE[0], PANEL_HEIGHT * len(panels)))


def curve_image(curve: Sequence[float]) -> torch.Tensor:
    """The plot of a strength curve, its numbers as the user gave them: an IMAGE (1, H, W, 3). See `figure_image`."""
    values = strength_curve(curve if len(curve) > 1 else [*curve, *curve])

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.plot(np.linspace(0, 1, len(values)), values, marker="o")
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(xlabel="share of the guided part, in log-SNR", ylabel="strength / mean", ylim=(0, None))

    return figure_image(draw, CURVE_SIZE)


def blank_image(size: tuple[float, float] = SIZE) -> torch.Tensor:
    """What stands for a plot of `size` inches that cannot be drawn: a white IMAGE."""
    width, height = (round(DPI * v) for v in size)
    return torch.ones(1, height, width, 3)

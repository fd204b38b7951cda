"""Curves as an IMAGE of the host."""

import numpy as np
import torch

SIZE = (7.0, 4.5)  # inches at 100 dots each


def curves_image(panels, x_label, x, labels=None):
    """An IMAGE (1, H, W, 3) with one panel above the other: {y label: (n, B) array} against x (n,).

    labels: names of the B curves, for a legend. None where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    # Not pyplot: it keeps figures in a global list, and nodes run in a thread of their own.
    figure = Figure(figsize=(SIZE[0], SIZE[1] if len(panels) == 1 else 2.6 * len(panels)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, values) in zip(axes, panels.items()):
        axis.plot(x, values, marker=".", linewidth=1)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel(x_label)
    if labels and len(labels) <= 10:
        axes[0].legend(labels, fontsize="small")
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]


def blank_image():
    """What stands for a plot that cannot be drawn."""
    return torch.ones(1, 8, 8, 3)

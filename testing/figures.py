"""Figures of the documents."""

from contextlib import contextmanager

import matplotlib


@contextmanager
def figure(path, *grid, **how):
    """(figure, axes), saved as `path` in the end. grid: as of plt.subplots, or one mosaic of names."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    make = plt.subplot_mosaic if grid and not isinstance(grid[0], int) else plt.subplots
    drawn, axes = make(*grid, layout="constrained", **how)
    yield drawn, axes
    drawn.savefig(path, dpi=110)
    plt.close(drawn)

"""Data N(0, diag(variance)) as a model, whose flow is known."""

import numpy as np

from ..dg_core.control import Control, guided_steps


def gaussian(variance, path):
    """model(x, sigma) -> denoised for data N(0, diag(variance)), and the list of sigmas it was called at."""
    calls = []

    def model(x, sigma):
        calls.append(sigma)
        alpha = path.alpha(sigma)
        return x * (alpha * variance / (alpha**2 * variance + sigma**2))

    return model, calls


def geometric(start, stop, steps):
    """`steps` + 1 noise levels, evenly spaced in log-SNR."""
    return np.geomspace(start, stop, steps + 1).tolist()


def control_of_z(schedule, z, dim, weights=None, **window):
    """The `Control` with z = Phi^-1(q) for images of dim elements; None where nothing is guided. window: see `guided_steps`."""
    steps = guided_steps(schedule, **window)
    return Control(steps, (2 * dim) ** 0.5 * z, weights) if steps and z else None

"""Data N(0, diag(variance)) as a model, whose flow is known."""

import numpy as np


def gaussian(variance, coordinates):
    """model(x, sigma) -> denoised for data N(0, diag(variance)), and the list of sigmas it was called at."""
    calls = []

    def model(x, sigma):
        calls.append(sigma)
        alpha = coordinates.alpha(sigma)
        return x * (alpha * variance / (alpha**2 * variance + sigma**2))

    return model, calls


def geometric(start, stop, steps):
    """`steps` + 1 noise levels, evenly spaced in log-SNR."""
    return np.geomspace(start, stop, steps + 1).tolist()

"""How far images are from those held out of the demo model's training, and from each other in composition."""

import numpy as np
import scipy.linalg
import torch

from ..nodes.builtin import demo
from ..training.demo_images import TrainingImages
from .demo_runs import IMAGES, band_energy

HELD_OUT_CROPS = 1024
BANDS = np.geomspace(0.03, 1.42, 9)  # radii, Nyquist = 1
BOOTSTRAPS = 200
LOW = 0.125  # radius below which an image's composition is, Nyquist = 1
FEATURES = len(BANDS) - 1 + 2 * 3


def features(samples):
    """Fixed numbers of images (n, 3, H, W) in [-1, 1], (n, FEATURES): texture by scale, and colour.

    Logarithms of the energy in the bands of spatial frequency; mean and standard deviation of each channel.
    """
    bands = [band_energy(samples, low, high).log() for low, high in zip(BANDS, BANDS[1:])]
    flat = samples.double().flatten(2)
    return torch.cat([torch.stack(bands, 1), flat.mean(2), flat.std(2)], 1).numpy()


def frechet(a, b):
    """Frechet distance between Gaussians fitted to the rows of two arrays."""
    means, covariances = zip(*((v.mean(0), np.cov(v, rowvar=False)) for v in (a, b)))
    cross = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * cross))


class HeldOut:
    """Features of held-out images, scaled to unit variance, to measure the distance of others to them."""

    def __init__(self, count=HELD_OUT_CROPS):
        values = features(self.draw(True, count, 7))
        self.images = len(TrainingImages(IMAGES, True).images)
        self.mean, self.std = values.mean(0), values.std(0)
        self.values = (values - self.mean) / self.std

    @staticmethod
    def draw(held_out, count, seed):
        return TrainingImages(IMAGES, held_out).draw(count, demo.SIZE, torch.Generator().manual_seed(seed))[0]

    def distance(self, samples):
        """(Frechet distance, its standard deviation over bootstraps of the samples)."""
        values = (features(samples) - self.mean) / self.std
        drawn = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAPS, len(values)))
        return frechet(values, self.values), float(np.std([frechet(values[i], self.values) for i in drawn]))


def low_frequencies(samples):
    """The images' composition: below the radius LOW."""
    f = 2 * torch.fft.fftfreq(samples.shape[-1], dtype=torch.float64)
    return torch.fft.ifft2(torch.fft.fft2(samples.double()) * (torch.hypot(f[:, None], f[None, :]) < LOW)).real


def composition_change(samples, plain):
    """Root mean square difference below the radius LOW between pairs of images."""
    return float((low_frequencies(samples) - low_frequencies(plain)).square().mean().sqrt())

"""Runs of the exact-density model in the host, and the exact bits per dimension of what they give."""

import comfy.samplers
import torch

from ..nodes import LoadExactDensityModel
from ..nodes.builtin.exact import read
from ..nodes.host.model_access import path_of


class Bench:
    """One prediction type of the model, at 32x32."""

    def __init__(self, prediction, component, batch):
        self.model, _, self.conditioning, self.latent = LoadExactDensityModel.execute(prediction, "32", component, batch).args
        self.sampling = self.model.get_model_object("model_sampling")
        self.path = path_of(self.sampling)
        self.density = self.model.model.density
        self.weights = None if component < 0 else self.density.one_hot(component)

    def sigmas(self, scheduler, steps):
        """Without the step to zero: the density is read at the last level above it."""
        return comfy.samplers.calculate_sigmas(self.sampling, scheduler, steps)[:-1]

    def sample(self, sampler, sigmas, noise, callback=None):
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(self.conditioning, self.conditioning)
        return guider.sample(noise, self.latent["samples"], sampler, sigmas, seed=11, disable_pbar=True, callback=callback)

    def noise(self):
        return torch.randn(self.latent["samples"].shape, generator=torch.Generator().manual_seed(5))

    def bits(self, sampler, sigmas, noise):
        return torch.tensor(read(self.model, self.sample(sampler, sigmas, noise), sigmas, self.weights))

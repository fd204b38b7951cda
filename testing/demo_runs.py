"""Runs of the demo model in the host, in small batches, and measures of detail of its images."""

from dataclasses import dataclass
from io import BytesIO

import comfy.model_management
import comfy.samplers
import numpy as np
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from PIL import Image

from ..launcher.environment import PACK
from ..nodes import PriorGuidanceScale
from ..nodes.builtin import demo
from ..nodes.builtin.pixels import CHANNELS
from ..nodes.host import readout
from ..nodes.host.scheduling import density_sigmas

IMAGES = PACK / ".host" / "data" / "pictures.safetensors"
BATCH = 16
# Apart: on a CPU the first noise that a sampler draws from the seed of the starting noise would be that noise.
NOISE_SEED, SAMPLER_SEED = 11, 1_000_003


def require_images():
    """Raise FileNotFoundError, with the way to make them, where the training images are not on this machine."""
    if not IMAGES.is_file():
        raise FileNotFoundError(f"{IMAGES} is missing: make it with training/demo_images.py from 0 A.D.'s public.zip")


@dataclass(frozen=True)
class Result:
    """samples: finished images (n, 3, H, W) in [-1, 1]; states: the latents before the last step, at noise `sigma`."""

    samples: torch.Tensor
    states: torch.Tensor
    sigma: float


class Demo:
    """The demo model with its first `seeds` noises; noise i asks for class i modulo their number."""

    def __init__(self, seeds, **precision):
        self.model, self.vae, names, self.context = demo.load(**precision)
        self.classes = torch.arange(seeds) % len(names)
        self.source = Noise_RandomNoise(NOISE_SEED)

    @property
    def latent(self):
        return {"samples": torch.zeros(len(self.classes), CHANNELS, demo.SIZE, demo.SIZE)}

    def noise(self, quantile=None, scale=1.0):
        """Noises of every seed, scaled by PriorGuidanceScale; quantile None leaves their norms."""
        matched = quantile is not None
        source = PriorGuidanceScale.execute(self.source, quantile if matched else 0.5, scale, matched)[0]
        return source.generate_noise(self.latent)

    def sigmas(self, steps):
        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "karras", steps)

    def parts(self, batch=BATCH):
        """The seeds in batches: tensors of their numbers."""
        return torch.arange(len(self.classes)).split(batch)

    def guider(self, part, model=None, cfg=1.0):
        guider = comfy.samplers.CFGGuider(model or self.model)
        guider.set_conds([[self.context[self.classes[part]], {}]], [[self.context[-1:], {}]])
        guider.set_cfg(cfg)
        return guider

    @torch.inference_mode()
    def run(self, sampler, steps, noise=None, model=None, cfg=1.0, batch=BATCH):
        """`Result` of every seed. sampler: what makes a SAMPLER for the images of a batch, from their numbers (floats)."""
        noise = self.noise(0.5) if noise is None else noise
        sigmas = self.sigmas(steps)
        samples, states = [], []
        for part in self.parts(batch):

            def keep(step, denoised, x, total):
                if step == total - 1:
                    states.append(self.model.model.process_latent_out(x.float()))

            samples.append(
                self.guider(part, model, cfg).sample(
                    noise[part],
                    torch.zeros_like(noise[part]),
                    sampler(part.double().tolist()),
                    sigmas,
                    callback=keep,
                    disable_pbar=True,
                    seed=SAMPLER_SEED + int(part[0]),
                )
            )
        return Result(torch.cat(samples), torch.cat(states), float(sigmas[-2]))

    @torch.inference_mode()
    def bits(self, result, levels):
        """Bits per dimension of every state and their standard errors, read with one probe at `levels` noise levels: lists."""
        values, errors = [], []
        for part in self.parts():
            guider, states = self.guider(part), result.states[part]
            s = readout.levels_of(guider, states, result.sigma, levels)
            found = readout.read(guider, states, s, 1, NOISE_SEED, part.tolist())[0]
            values += found.bits_per_dim.tolist()
            errors += found.error_bits_per_dim.tolist()
        return values, errors

    @torch.inference_mode()
    def denoised(self, noisy, s, classes):
        """What the network makes of latents (n, 3, H, W) at the noise level s, for classes (n,)."""
        comfy.model_management.load_models_gpu([self.model])
        device = self.model.load_device
        return torch.cat(
            [
                self.model.model.apply_model(
                    x.to(device), torch.full((len(x),), s, device=device), c_crossattn=self.context[kinds].to(device)
                ).cpu()
                for x, kinds in zip(noisy.split(BATCH), classes.split(BATCH))
            ]
        )

    def images(self, samples):
        """What VAEDecode makes of them, (n, H, W, 3) in [0, 1]."""
        return self.vae.decode(samples)


class Scheduled(Demo):
    """With the pack's own scheduler."""

    def sigmas(self, steps):
        return density_sigmas(self.model, steps, 1.0, self.latent)


def png_bytes(images):
    """Size of each image (n, H, W, 3) as a PNG file: an array."""
    sizes = []
    for image in images:
        file = BytesIO()
        Image.fromarray((image.numpy() * 255).round().clip(0, 255).astype(np.uint8)).save(file, "PNG")
        sizes.append(file.tell())
    return np.array(sizes)


def spectrum(samples):
    """(energy (n, H, W) of every spatial frequency, mean over channels; the frequency's radius, Nyquist = 1, (H, W))."""
    energy = torch.fft.fft2(samples.double(), norm="ortho").abs().square().mean(1)
    f = 2 * torch.fft.fftfreq(samples.shape[-1], dtype=torch.float64)
    return energy, torch.hypot(f[:, None], f[None, :])


def band_energy(samples, low, high):
    """Energy per element of each image at radii in [low, high) of the Nyquist frequency, (n,)."""
    energy, radius = spectrum(samples)
    return energy[:, (radius >= low) & (radius < high)].sum(1) / radius.numel()


def high_energy(samples):
    """Energy per element above half of the Nyquist frequency: an array."""
    return band_energy(samples, 0.5, 2).numpy()

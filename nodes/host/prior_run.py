"""Prior guidance of a run: its inputs and settings, and where the host's noise is scaled."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.utils
import torch

from ...dg_core.prior import scale_noise
from .inputs import QUANTILE, Number, Widget, check_fields, defaults

INPUTS = (
    replace(
        QUANTILE,
        neutral="any, with match_quantile off",
        text="Quantile of the noise's own log-density, which sets the norm of the noise. Below 0.5: larger noise, more detail; "
        "above 0.5: smaller noise, smoother. 0.5 is the median. Changes little; scale changes more.",
    ),
    Number(
        "scale",
        "Extra factor on the noise, after the quantile. Larger adds detail; stay near 1.",
        default=1.0,
        neutral=1.0,
        low=0.0,
        high=10.0,
        step=0.001,
        round=0.0001,
    ),
    Widget(
        "match_quantile",
        "On: the noise of every image gets the norm of the quantile, the same for every seed. Off: the "
        "noise is only multiplied by scale.",
        default=True,
        neutral="off, with scale 1",
    ),
)
_DEFAULT = defaults(INPUTS)


@dataclass(frozen=True)
class PriorSettings:
    """The inputs that the prior guidance nodes share.

    Raises ValueError, naming the input, where one is out of range.
    """

    quantile: float = _DEFAULT["quantile"]
    scale: float = _DEFAULT["scale"]
    match_quantile: bool = _DEFAULT["match_quantile"]

    def __post_init__(self) -> None:
        check_fields(self, INPUTS)

    def apply(self, noise: torch.Tensor, noise_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled copy of `noise` (B, ...); with a noise mask of the host, only the masked part.

        The mask may be prepared already, as newer hosts hand it to a model's wrappers: in the noise's own shape.
        """
        mask = noise_mask
        if mask is not None and mask.shape != noise.shape:
            mask = comfy.sampler_helpers.prepare_mask(mask, noise.shape, noise.device)
        return scale_noise(noise, self.quantile if self.match_quantile else None, self.scale, mask)


class ScaledNoise:
    """A noise source of the host whose noise is scaled image by image; keeps seed and batch_index."""

    def __init__(self, noise: Any, settings: PriorSettings):
        self._noise = noise
        self._settings = settings
        self.seed = noise.seed

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        """The scaled noise (B, ...) for a LATENT; nested as the latent is."""
        noise = self._noise.generate_noise(input_latent)
        if getattr(noise, "is_nested", False):
            return type(noise)([self._settings.apply(part) for part in noise.unbind()])
        return self._settings.apply(noise, input_latent.get("noise_mask"))


def scaled_patch(model: Any, settings: PriorSettings) -> Any:
    """A clone of a MODEL whose runs begin with scaled noise."""

    def scale_run(
        executor: Callable[..., torch.Tensor],
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Any,
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        shapes = kwargs.get("latent_shapes") or [noise.shape]
        if len(shapes) > 1:  # video and audio, packed into one
            parts = comfy.utils.unpack_latents(noise, shapes)
            noise, _ = comfy.utils.pack_latents([settings.apply(part) for part in parts])
        else:
            noise = settings.apply(noise, denoise_mask)
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)

    patched = model.clone()
    patched.add_wrapper(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, scale_run)
    return patched

"""Prior guidance, as a noise source and as a model patch: the starting noise at a quantile of its log-density."""

from dataclasses import dataclass, replace
from typing import Any

import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.utils
import torch
from comfy_api.latest import io

from ..dg_core.prior import scale_noise
from .host.inputs import CATEGORY, QUANTILE, Number, Socket, Widget, check_fields, schemas

INPUTS = (
    replace(
        QUANTILE,
        neutral="any, with match_quantile off",
        text="Quantile of the noise's own log-density, which sets the norm of the noise. Below 0.5: larger noise, more detail; "
        "above 0.5: smaller noise, smoother. 0.5 is the median. A gentle control.",
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
        "On: the noise of every image gets the norm of the quantile, so that seeds start alike. Off: the "
        "noise is only multiplied by scale.",
        default=True,
        neutral="off, with scale 1",
    ),
)
NOISE = Socket(
    "noise", "The noise to scale, for instance of RandomNoise. Its seed is kept; DisableNoise stays as it is.", io.Noise
)
MODEL = Socket("model", "The model whose starting noise is scaled. Its weights are not changed.", io.Model)


@dataclass(frozen=True)
class PriorSettings:
    """The inputs that the prior guidance nodes share.

    Raises ValueError, naming the input, where one is out of range.
    """

    quantile: float = 0.5
    scale: float = 1.0
    match_quantile: bool = True

    def __post_init__(self) -> None:
        check_fields(self, INPUTS)

    def apply(self, noise: torch.Tensor, noise_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled copy of `noise` (B, ...); with a noise mask of the host, only the masked part."""
        mask = None
        if noise_mask is not None:
            mask = comfy.sampler_helpers.prepare_mask(noise_mask, noise.shape, noise.device)
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


class PriorGuidanceScale(io.ComfyNode):
    INPUTS = (NOISE, *INPUTS)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PriorGuidanceScale",
            display_name="Prior Guidance Scale",
            category=CATEGORY,
            description="Scales the starting noise: larger noise gives more detail, smaller noise less. The gentlest detail "
            "control; the sampling itself does not change.",
            inputs=schemas(cls.INPUTS),
            outputs=[io.Noise.Output(display_name="noise", tooltip="The scaled noise, for SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise: Any, quantile: float, scale: float, match_quantile: bool) -> io.NodeOutput:
        settings = PriorSettings(quantile, scale, match_quantile)
        return io.NodeOutput(ScaledNoise(NOISE.check(noise), settings))


class PriorGuidanceModel(io.ComfyNode):
    INPUTS = (MODEL, *INPUTS)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PriorGuidanceModel",
            display_name="Prior Guidance (model)",
            category=CATEGORY,
            description="Prior Guidance Scale as a patch of the model: for KSampler, which makes its own noise.",
            inputs=schemas(cls.INPUTS),
            outputs=[io.Model.Output(display_name="model", tooltip="The model with scaled starting noise.")],
        )

    @classmethod
    def execute(cls, model: Any, quantile: float, scale: float, match_quantile: bool) -> io.NodeOutput:
        settings = PriorSettings(quantile, scale, match_quantile)
        MODEL.check(model)

        def scale_run(
            executor: Any,
            noise: torch.Tensor,
            latent_image: torch.Tensor,
            sampler: Any,
            sigmas: torch.Tensor,
            denoise_mask: torch.Tensor | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            shapes = kwargs.get("latent_shapes") or [noise.shape]
            if len(shapes) > 1:  # video and audio, packed into one
                parts = comfy.utils.unpack_latents(noise, shapes)
                noise, _ = comfy.utils.pack_latents([settings.apply(part) for part in parts])
            else:
                noise = settings.apply(noise, denoise_mask)
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)

        patched = model.clone()
        patched.add_wrapper(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, scale_run)
        return io.NodeOutput(patched)

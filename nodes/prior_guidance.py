"""Prior guidance, as a noise source and as a model patch: the starting noise at a quantile of its log-density."""

from dataclasses import dataclass

import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.utils
from comfy_api.latest import io

from ..dg_core.prior import scale_noise
from ..dg_core.units import require_number
from .host.inputs import CATEGORY, require


@dataclass(frozen=True)
class PriorSettings:
    """The inputs that the prior guidance nodes share.

    Raises ValueError, naming the input, where one is out of range.
    """

    quantile: float = 0.5
    scale: float = 1.0
    match_quantile: bool = True

    def __post_init__(self):
        require_number("quantile", self.quantile, 0.001, 0.999)
        require_number("scale", self.scale, 0.0, 10.0)

    def apply(self, noise, noise_mask=None):
        """Scaled copy of `noise` (B, ...); with a noise mask of the host, only the masked part."""
        mask = None
        if noise_mask is not None:
            mask = comfy.sampler_helpers.prepare_mask(noise_mask, noise.shape, noise.device)
        return scale_noise(noise, self.quantile if self.match_quantile else None, self.scale, mask)


class ScaledNoise:
    """A noise source of the host whose noise is scaled image by image; keeps seed and batch_index."""

    def __init__(self, noise, settings):
        self._noise = noise
        self._settings = settings
        self.seed = noise.seed

    def generate_noise(self, input_latent):
        noise = self._noise.generate_noise(input_latent)
        if getattr(noise, "is_nested", False):
            return type(noise)([self._settings.apply(part) for part in noise.unbind()])
        return self._settings.apply(noise, input_latent.get("noise_mask"))


def _inputs():
    return [
        io.Float.Input(
            "quantile", default=0.5, min=0.001, max=0.999, step=0.01, round=0.001,
            tooltip="Quantile q of the noise's own log-density, which gives its norm r. 0.5 is the default, the median norm; "
                    "above it a smaller norm and a smoother image, below it more detail. No unit. Neutral: any, with "
                    "match_quantile off."),
        io.Float.Input(
            "scale", default=1.0, min=0.0, max=10.0, step=0.001, round=0.0001,
            tooltip="Extra factor on the noise n, after the quantile. 1 is neutral; larger gives more detail. No unit."),
        io.Boolean.Input(
            "match_quantile", default=True,
            tooltip="On: give the noise of every image the norm of the quantile, so that seeds start alike. "
                    "Off: only multiply by scale; with scale 1 that is neutral."),
    ]


class PriorGuidanceScale(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PriorGuidanceScale",
            display_name="Prior Guidance Scale",
            category=CATEGORY,
            description="Scales the starting noise of every image to a quantile of its log-density: the simplest "
                        "detail control, with no change to the sampling itself.",
            inputs=[
                io.Noise.Input("noise", tooltip="The noise to scale, for instance of RandomNoise. Its seed is kept; "
                                                "DisableNoise stays as it is."),
                *_inputs(),
            ],
            outputs=[io.Noise.Output(display_name="noise", tooltip="The scaled noise, for SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise, quantile, scale, match_quantile):
        settings = PriorSettings(quantile, scale, match_quantile)
        require("noise", noise, "generate_noise", "a NOISE, for instance of RandomNoise")
        return io.NodeOutput(ScaledNoise(noise, settings))


class PriorGuidanceModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PriorGuidanceModel",
            display_name="Prior Guidance (model)",
            category=CATEGORY,
            description="Prior Guidance Scale as a patch of the model: for KSampler, which makes its own noise.",
            inputs=[
                io.Model.Input("model",
                               tooltip="The model whose starting noise is scaled. Its weights are not changed."),
                *_inputs(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with scaled starting noise.")],
        )

    @classmethod
    def execute(cls, model, quantile, scale, match_quantile):
        settings = PriorSettings(quantile, scale, match_quantile)
        require("model", model, "add_wrapper", "a MODEL")

        def scale_run(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
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

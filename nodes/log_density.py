"""The log-density of latents under any model, with an error bar."""

from typing import Any

from comfy_api.latest import io

from .host.inputs import CATEGORY, PROBES, Floats, Seed, Socket, batch_index_of, samples_of, schemas
from .host.readout import GUIDER, NOISE_FLOOR, STEPS, levels_of, plot_of, read, report_of

SEED = Seed("seed", "Seed of the probes. Changing it changes the estimate slightly.")


class LogDensity(io.ComfyNode):
    """Bits per dimension of any LATENT under a guider's model: see `host.readout`."""

    INPUTS = (
        GUIDER,
        Socket("latent", "The images to read, from VAEEncode or a sampler. A mask is ignored.", io.Latent),
        STEPS,
        PROBES,
        SEED,
        NOISE_FLOOR,
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LogDensity",
            display_name="Log-Density",
            category=CATEGORY,
            description="Measures how much detail an image has under your model, in bits per dimension, with an error bar. "
            "Works with every image that you can encode.",
            inputs=schemas(cls.INPUTS),
            outputs=[
                Floats.Output(
                    display_name="bits_per_dim",
                    tooltip="-log2 p / D of each image: larger means more detail, as with detail_shift.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Each value with its standard error, the squared norm of eps over D, and how it was computed.",
                ),
                io.Image.Output(display_name="plot", tooltip="Rate of log-density against log-SNR, a curve for each image."),
            ],
        )

    @classmethod
    def execute(
        cls, guider: Any, latent: dict[str, Any], steps: int, probes: int, seed: int, noise_floor: float
    ) -> io.NodeOutput:
        steps, probes, seed = STEPS.check(steps), PROBES.check(probes), SEED.check(seed)
        samples = samples_of("latent", latent)
        levels = levels_of(guider, samples, noise_floor, steps)
        indices = batch_index_of("latent", latent, len(samples))
        readout, how = read(guider, samples, levels, probes, seed, indices)
        report = report_of(readout, [*how, f"steps {steps}, probes {probes}, seed {seed}, noise floor {levels[0]:.4g}"])
        return io.NodeOutput(readout.bits_per_dim.tolist(), report, plot_of(readout))

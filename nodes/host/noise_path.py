"""How a model of the host mixes image and noise, by what its sampling does with numbers.

Its class says too little: bridges from image to image inherit from flow models, and new classes come with every host.
"""

import math
from typing import Any

import torch

from ...dg_core.schedule import NoisePath

SIGMAS = (0.2, 0.5, 0.8)  # all three lie in the range of a flow model
LITTLE = 1e-3  # a sigma at which the state is the image
MUCH = 10.0  # a sigma at which the state is not what a network takes
TOLERANCE = 1e-4  # for samplings that compute in float32
REMAINDER = 0.01  # of what a network's output still weighs at LITTLE
KNOWN = "models whose noisy latent is image + sigma * noise (eps, v, EDM) or (1 - sigma) * image + sigma * noise (flow)"


def path_of(model_sampling: Any) -> NoisePath:
    """The `NoisePath` of one of the host's model samplings.

    Raises ValueError, saying what it does instead, for a sampling without one: an image-to-image bridge, or another path.
    """
    mixes = [_mix(model_sampling, sigma) for sigma in SIGMAS]
    scale = _common([noise / sigma for (_, noise), sigma in zip(mixes, SIGMAS)])
    images = [image for image, _ in mixes]
    kind = "VE" if _close(images, [1.0] * len(SIGMAS)) else "flow" if _close(images, [1 - v for v in SIGMAS]) else None
    if kind is None or scale is None:
        image, noise = mixes[1]
        raise _refusal(model_sampling, f"at sigma {SIGMAS[1]:g} its latent is {image:.3g} * image + {noise:.3g} * noise")
    state, output = _prediction(model_sampling, LITTLE)
    if not (_close([state, output], [1, 0], REMAINDER) or _close([state, output], [0, 1], REMAINDER)):
        raise _refusal(
            model_sampling,
            f"with almost no noise its prediction is {state:.3g} * latent + {output:.3g} * the network's output, and should be "
            "one of the two",
        )
    if kind == "VE" and _ignores_noise(model_sampling):
        raise _refusal(model_sampling, "its network gets the latent at any noise alike, and its output alone is the prediction")
    return NoisePath(kind, scale)


def _mix(model_sampling: Any, sigma: float) -> tuple[float, float]:
    """(weight of the image, weight of the noise) in the latent at sigma; NaN where it is no sum of the two."""
    image, noise = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]], dtype=torch.float64).view(2, 3, 1, 1, 1)
    mixed = model_sampling.noise_scaling(torch.tensor(sigma, dtype=torch.float64), noise.clone(), image, False)
    image_weight, noise_weight, both = mixed.flatten().tolist()
    linear = math.isclose(both, 2 * image_weight - noise_weight, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return (image_weight, noise_weight) if linear else (math.nan, math.nan)


def _prediction(model_sampling: Any, sigma: float) -> tuple[float, float]:
    """(weight of the latent, weight of the network's output) in the prediction at sigma."""
    state, output = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).view(2, 2, 1, 1, 1)
    level = torch.full((2,), sigma, dtype=torch.float64)
    state_weight, output_weight = model_sampling.calculate_denoised(level, output, state).flatten().tolist()
    return state_weight, output_weight


def _ignores_noise(model_sampling: Any) -> bool:
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    taken = float(model_sampling.calculate_input(torch.full((1,), MUCH, dtype=torch.float64), one))
    return taken == 1 and _close([_prediction(model_sampling, MUCH)[0]], [0])


def _common(values: list[float]) -> float | None:
    """The positive number that all `values` are, exactly 1 where they are nearly 1; None where they differ."""
    if not values[0] > 0 or not _close(values, [values[0]] * len(values), TOLERANCE * values[0]):
        return None
    return 1.0 if _close(values, [1.0] * len(values)) else values[0]


def _close(values: list[float], wanted: list[float], tolerance: float = TOLERANCE) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(values, wanted, strict=True))


def _refusal(model_sampling: Any, reason: str) -> ValueError:
    parts = ("noise_scaling", "calculate_denoised", "calculate_input")
    name = next((c.__name__ for c in type(model_sampling).__mro__ if any(part in vars(c) for part in parts)), "")
    name = name or type(model_sampling).__name__
    return ValueError(
        f"the model's sampling type {name} has no Gaussian noise path, so its log-density is undefined: {reason}; density "
        f"guidance works with {KNOWN}"
    )

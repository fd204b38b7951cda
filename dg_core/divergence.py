"""Divergence of eps, from directional derivatives of a denoiser.

symbol      name          definition
Dhat        -             d denoised / d y, the Jacobian of the denoiser in VE coordinates (see `schedule`)
J           -             d eps / d y = (I - Dhat) / s
v           probe         a Rademacher vector: independent signs, so <v, v> = D and E <v, A v> = tr A

The identity part of J is exact for every probe: div eps = tr J = (D - tr Dhat) / s, and only tr Dhat is estimated
(M. F. Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"). Forward-mode AD gives Dhat v to
rounding at about twice the cost of a prediction; two-sided finite differences take two more predictions.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .random_numbers import generator_of
from .statistics import compute_dtype, image_sums, inner, per_image, squared_norm, sum_dtype

# x (B, ...) -> denoised (B, ...), at a fixed noise level
LevelDenoiser = Callable[[torch.Tensor], torch.Tensor]

FORWARD, DIFFERENCES = "forward", "differences"
METHODS = (FORWARD, DIFFERENCES)
TRIAL_CALLS = 4  # of `method_of`, each on one batch


def directional_derivative(
    predict: LevelDenoiser, x: torch.Tensor, v: torch.Tensor, method: str, step: torch.Tensor | float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(predict(x), D v) with D = d predict / d x, both of x's shape, in float32 or wider.

    predict(x) -> denoised, at a fixed noise level, for a batch of len(x) images, or of 2 len(x) with "differences" (it
    may split that). v is shaped like x. method: one of `METHODS`. step: the h of [f(x + h v) - f(x - h v)] / 2h, (B,);
    None: `difference_step` for a network in x's dtype. Leaves inference mode, in which derivatives do not exist; a
    network's weights may be inference tensors. Raises ValueError for another method or a v of another shape, and what
    torch raises where the network has no forward rule.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    if v.shape != x.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must have the shape of x, {tuple(x.shape)}")
    wide = compute_dtype(x.dtype)
    with torch.inference_mode(False), torch.no_grad():
        x, v = _ordinary(x.to(wide)), _ordinary(v.to(wide))
        if method == FORWARD:
            return _forward(predict, x, v)
        return _differences(predict, x, v, difference_step(x, v, x.dtype) if step is None else step)


def _forward(predict: LevelDenoiser, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has no forward rule
        stack.enter_context(forward_ad.dual_level())
        value, slope = forward_ad.unpack_dual(predict(forward_ad.make_dual(x, v)))
        # A prediction that does not depend on x, as at infinite noise, carries no tangent.
        slope = torch.zeros_like(value) if slope is None else slope
        return value.to(x.dtype), slope.to(x.dtype)


def _differences(
    predict: LevelDenoiser, x: torch.Tensor, v: torch.Tensor, step: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    value = predict(x).to(x.dtype)
    h = per_image(step.to(x) if isinstance(step, torch.Tensor) else x.new_full((len(x),), step), x.ndim)
    above, below = predict(torch.cat([x + h * v, x - h * v])).to(x.dtype).chunk(2)
    return value, (above - below) / (2 * h)


def derivative_calls(method: str) -> int:
    """Predictions that `directional_derivative` asks for; with "forward" it also carries a derivative."""
    return 1 if method == FORWARD else 3


def trace_calls(method: str, probes: int) -> int:
    """Predictions that `trace_derivative` asks for; with "forward" each also carries a derivative."""
    return 1 + (2 if method == FORWARD else 4) * probes


def trace_derivative(
    predict: LevelDenoiser,
    x: torch.Tensor,
    v: torch.Tensor,
    probes: Callable[[torch.Tensor | None], Iterable[torch.Tensor]],
    method: str,
    steps: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(predict(x), D v, t): t is the derivative along v of the Hutchinson trace of D, (B,), the mean over the probes of
    <p, D^2 predict[v, p]>. See `directional_derivative` for predict, x, v and method.

    probes(D v or None) -> tensors of x's shape. "forward" takes the derivative along p by AD and differences of it along
    v: one dual prediction, after which it asks for the probes, and two for each of them. "differences" takes mixed
    differences over x +- a v +- b p, which give D v too: one prediction, and four for each probe. steps: (a, b), each (B,);
    None: `trace_steps` for a network in x's dtype.
    """
    a, b = trace_steps(x, v, x.dtype, method) if steps is None else steps
    wide = compute_dtype(x.dtype)
    with torch.inference_mode(False), torch.no_grad():
        x, v = _ordinary(x.to(wide)), _ordinary(v.to(wide))
        a, b = (per_image(step.to(wide), x.ndim) for step in (a, b))
        if method == FORWARD:
            value, slope = _forward(predict, x, v)
            bends = [
                (p, (_forward(predict, x + a * v, p)[1] - _forward(predict, x - a * v, p)[1]) / (2 * a))
                for p in map(_ordinary, probes(slope))
            ]
        else:
            value, slopes, bends = predict(x).to(wide), [], []
            for p in map(_ordinary, probes(None)):
                points = torch.cat([x + a * v + b * p, x + a * v - b * p, x - a * v + b * p, x - a * v - b * p])
                pp, pm, mp, mm = predict(points).to(wide).chunk(4)
                slopes.append((pp + pm - mp - mm) / (4 * a))
                bends.append((p, (pp - pm - mp + mm) / (4 * a * b)))
            slope = torch.stack(slopes).mean(0)
        return value, slope, torch.stack([probe_trace(p, bend) for p, bend in bends]).mean(0)


def trace_steps(
    x: torch.Tensor, v: torch.Tensor, dtype: torch.dtype, method: str, scale: torch.Tensor | float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps a along v and b along a probe of `trace_derivative`, (B,) each; dtype and scale as in `difference_step`.

    Rounding contributes e ||x|| / (a ||v|| b ||p||) to a mixed second difference, and the fourth derivative about (h / L)^2
    of it with h = a ||v|| = b ||p||: relative to a second derivative of size 1 / L the sum is least at
    h = (e ||x|| L^3)^(1/4). With AD along the probe only the first difference is left, and `difference_step` holds.
    """
    if method == FORWARD:
        a = difference_step(x, v, dtype, scale)
        return a, a
    e = _rounding_unit(dtype)
    norm_x, norm_v, length = _lengths(x, v, scale)
    h = (e * norm_x * length**3) ** (1 / 4)
    return h / norm_v, h / x[0].numel() ** 0.5


def _rounding_unit(dtype: torch.dtype) -> float:
    """Of `dtype`, or of float32 if that is coarser: hosts hand predictions around in it."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _lengths(
    x: torch.Tensor, v: torch.Tensor, scale: torch.Tensor | float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    norm_x = squared_norm(x).sqrt().clamp_min(1e-12)
    norm_v = squared_norm(v).sqrt().clamp_min(1e-12)
    if scale is None:
        return norm_x, norm_v, norm_x
    # A float stays one: as a tensor it would be copied to the device, and that waits for it.
    scale = scale.to(norm_x) if isinstance(scale, torch.Tensor) else torch.full_like(norm_x, scale)
    return norm_x, norm_v, scale * x[0].numel() ** 0.5


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it where it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def difference_step(
    x: torch.Tensor, v: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | float | None = None
) -> torch.Tensor:
    """The step h of two-sided differences for a network that computes in `dtype`: (B,), on x's device.

    Rounding contributes e ||x|| / h and the third derivative about (h ||v|| / L)^2 ||v|| with L the length over which a
    denoiser bends; the sum is least at h = (e ||x|| L^2)^(1/3) / ||v||. L = scale * sqrt(D) with `scale` the noise level
    sigma (float or (B,)) in the units of x; None: L = ||x||, right where x is mostly noise. e is the rounding unit of
    `dtype`, or of float32 if that is coarser: hosts hand predictions around in it.
    """
    e = _rounding_unit(dtype)
    norm_x, norm_v, length = _lengths(x, v, scale)
    return (e * norm_x * length.square()) ** (1 / 3) / norm_v


def method_of(
    predict: LevelDenoiser,
    x: torch.Tensor,
    v: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    scale: torch.Tensor | float | None = None,
) -> tuple[str, str]:
    """(method, reason): forward-mode AD where it works on this network, else differences. Costs `TRIAL_CALLS`.

    Tries forward mode once at x, along v, and compares it with differences: some networks refuse it, and some drop the
    tangent without a word. dtype, scale: as in `difference_step`. reason: one sentence for a report. Lack of memory passes
    through: it says nothing about the network.
    """
    _, by_differences = directional_derivative(predict, x, v, DIFFERENCES, difference_step(x, v, dtype, scale))
    try:
        _, forward = directional_derivative(predict, x, v, FORWARD)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # also NotImplementedError
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return DIFFERENCES, f"two-sided differences: forward-mode AD failed on this network ({why})"
    largest = squared_norm(forward).sum() + 1e-6 * squared_norm(v).sum()
    gap = float((squared_norm(forward - by_differences).sum() / largest).sqrt())
    if not gap <= agreement(dtype):
        return DIFFERENCES, (
            f"two-sided differences: forward-mode AD differs from them by {gap:.1%} on this network, "
            f"more than the {agreement(dtype):.0%} that rounding explains"
        )
    return FORWARD, f"forward-mode AD, which differs from two-sided differences by {gap:.2%}"


def agreement(dtype: torch.dtype) -> float:
    """How far, relatively, a right forward derivative may be from differences in a network of `dtype`."""
    return min(0.5, max(0.01, 4 * torch.finfo(dtype).eps ** (1 / 2)))


def rademacher(x: torch.Tensor, seed: int, call: int, indices: Sequence[int] | None = None) -> torch.Tensor:
    """A probe of x's shape, device and (at least float32) dtype: independent signs for every image and model call.

    The signs of an image depend on (seed, its index, call) alone, never on the batch. indices: one int for each image;
    None: its place in the batch.
    """
    indices = range(len(x)) if indices is None else indices
    signs = [_signs(x.shape[1:], (seed, index, call)) for index in indices]
    return torch.stack(signs).to(x.device, compute_dtype(x.dtype))


def _signs(shape: Sequence[int], key: Iterable[int]) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.randint(0, 2, shape, generator=generator_of(*key), dtype=torch.int8) * 2 - 1


def stratified(probe: torch.Tensor, directions: Iterable[torch.Tensor], signs: Iterable[torch.Tensor]) -> torch.Tensor:
    """The probe with exactly `signs` as its components along `directions`, made orthogonal to each other.

    directions: tensors of the probe's shape and of any length above 0, which must not depend on the probe; signs: +1 or -1,
    (B,) for each. E[p p^T] = I stays true for independent signs, and the variance of <p, A p> loses what A has along one
    direction alone: all of it where A = d d^T and one of them is d, as where a mixture decides between two of its components
    (derived here).
    """
    basis: list[torch.Tensor] = []
    for direction, sign in zip(directions, signs):
        for e in basis:
            direction = direction - inner(e, direction) * e
        e = direction / inner(direction, direction).sqrt().clamp_min(1e-30)
        probe = probe + (per_image(sign.to(e), e.ndim) - inner(e, probe)) * e
        basis.append(e)
    return probe


def random_signs(seed: int, call: int, place: int, indices: Sequence[int] | None, like: torch.Tensor) -> torch.Tensor:
    """One sign for every image, call and place, (B,), on the device of `like` and independent of its `rademacher` probe."""
    indices = range(len(like)) if indices is None else indices
    signs = [_signs((1,), (seed, index, call, 1 + place)) for index in indices]
    return torch.cat(signs).to(like.device, compute_dtype(like.dtype))


def probe_trace(v: torch.Tensor, dhat_v: torch.Tensor) -> torch.Tensor:
    """<v, Dhat v> of every image, (B,), summed in float64 where the device has it."""
    return image_sums(v * dhat_v, sum_dtype(v.device))

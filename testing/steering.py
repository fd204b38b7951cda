"""The guided prediction, written again from its definition, and how far a recorded run is from it."""

import math

import scipy.stats
import torch


def alpha_of(model, sigma):
    """alpha of one of the host's models: flow models are those whose noise is scaled by sigma and data by 1 - sigma."""
    probe = model.get_model_object("model_sampling").noise_scaling(
        torch.tensor([0.25]), torch.zeros(1, 1), torch.ones(1, 1), False
    )
    return 1 - sigma if float(probe) == 0.75 else 1.0


def guided_steps(model, sigmas, start=0.0, end=1.0):
    """Numbers of the steps that guidance from `start` to `end` percent of the sampling acts on."""
    high, low = map(model.get_model_object("model_sampling").percent_to_sigma, (start, end))
    return [
        i for i in range(len(sigmas) - 1) if low < sigmas[i] <= high and sigmas[i + 1] > 0 and alpha_of(model, sigmas[i]) > 1e-6
    ]


def push(model, sigmas, dim, quantile=0.5, detail_shift=0.0, start=0.0, end=1.0):
    """(eta - 1) ||eps||^2 = sqrt(2 D) z - detail_shift ln(2) D / L, L the guided steps' length in ln s."""
    steps = guided_steps(model, sigmas, start, end)
    s = [sigmas[i] / alpha_of(model, sigmas[i]) for i in (steps[0], steps[-1] + 1)]
    return (2 * dim) ** 0.5 * scipy.stats.norm.ppf(quantile) - detail_shift * math.log(2) * dim / math.log(s[0] / s[1])


def steered(model, x, denoised, sigma, pushed, weights=1.0):
    """x0~ = x0 - (sigma / alpha) (eta - 1) w eps with eta - 1 = pushed(D) / <w eps, eps>, D the sum of w; float64."""
    x, denoised = x.double(), denoised.double()
    alpha = alpha_of(model, sigma)
    eps = (x - alpha * denoised) / sigma
    w = torch.as_tensor(weights).double() * torch.ones_like(x)
    strength = pushed(w.flatten(1).sum(1)) / (w * eps.square()).flatten(1).sum(1)
    return denoised - sigma / alpha * strength.view(-1, *[1] * (x.ndim - 1)) * w * eps


def guided_solver_step(model, x, denoised, sigmas, step, quantile, mask=None):
    """What guidance adds to the own solver's next state in its first guided `step`, from (x, denoised) there; float64.

    The integral of g = (s / sqrt(1 + s^2)) (eta - 1) eps over ln s, with g as it is at the start, in units of x. mask: of
    the inpainting.
    """
    x, denoised = x.double(), denoised.double()
    (sigma, sigma_next), (alpha, alpha_next) = sigmas[step : step + 2], (alpha_of(model, v) for v in sigmas[step : step + 2])
    eps = (x - alpha * denoised) / sigma
    inside = torch.ones_like(x) if mask is None else (mask > 0) * torch.ones_like(x)
    dim, norm2 = (v.flatten(1).sum(1) for v in (inside, inside * eps.square()))
    eta = (2 * dim).sqrt() * scipy.stats.norm.ppf(quantile) / norm2
    log_range = math.log(sigma_next / alpha_next) - math.log(sigma / alpha)
    strength = math.hypot(alpha_next, sigma_next) * sigma / math.hypot(alpha, sigma) * log_range * eta
    return strength.view(-1, *[1] * (x.ndim - 1)) * eps * (1 if mask is None else mask)


def deviation(model, seen, sigmas, quantile, weights=None, within=None, factors=None, detail_shift=0.0):
    """How far a recorded run is from guidance of its final prediction.

    sigmas: the schedule. weights: of a mask. within: None, or the mask outside of which the host replaces the prediction.
    factors: of the strength, {step: number}; 1 where there are none. Returns (largest error of the change, relative to it,
    and share eta - 1 of each guided step, smallest and largest). The error is the part of (guided - unguided) that differs
    from the wanted one, projected on that. Raises AssertionError where an unguided step is changed.
    """
    guided, inside = guided_steps(model, sigmas), 1.0 if within is None else within
    pushed = lambda dim: push(model, sigmas, dim, quantile, detail_shift)
    assert guided, "the schedule has no step to guide"
    worst, shares = 0.0, []
    for x, sigma, denoised, final in zip(seen.x, seen.sigma, seen.denoised, seen.final):
        level = float(sigma[0])
        step = min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - level))
        if not math.isclose(sigmas[step], level, rel_tol=1e-5) or step not in guided:
            assert torch.equal(final, denoised), f"changed at sigma {level}, which is not guided"
            continue
        unguided = denoised.double()
        wanted = (steered(model, x, denoised, level, pushed, 1.0 if weights is None else weights) - unguided) * inside
        wanted *= 1 if factors is None else factors[step]
        change = (final.double() - unguided) * inside
        wanted, change = wanted.flatten(1), change.flatten(1)
        scale = wanted.square().sum(1)
        assert (scale > 0).all(), f"nothing to steer at sigma {level}"
        rounding = 4e-7 * unguided.abs().amax()
        allowed = 1e-5 * wanted.abs().amax() + rounding
        assert ((change - wanted).abs() <= allowed).all(), f"not the wanted change at {level}"
        worst = max(worst, float(((change * wanted).sum(1) / scale - 1).abs().max()))
        eps = (x.double() - alpha_of(model, level) * unguided).flatten(1)
        share = -alpha_of(model, level) * (change * eps).sum(1) / eps.square().sum(1)
        shares += [float(share.min()), float(share.max())]
    return worst, (min(shares), max(shares))

"""What is known for free along a run of any sampler: from its states and the model's predictions there, nothing else.

A step of the host's samplers goes from (y, s) to (y', s') with the unguided prediction `denoised` at y. With that held
fixed over the step, eps' = (y' - denoised) / s' says what was done:

* s_down = s' <eps, eps'> / |eps|^2 is the part of s' that is old noise, to 1 / (|eps| sqrt(D)). The reverse SDE with
  noise c times its full strength has s_down^2 = s'^2 - c^2 s'^2 (1 - (s'/s)^2): so c^2 is known, 0 for an ODE sampler,
  1 for the full SDE.
* log p changes by -(|eps'|^2 - |eps|^2) / 2 + D ln(s / s') - (1 - c^2) tr Dhat ln(s / s'), to first order in the step:
  without any divergence where c = 1 (arXiv 2411.01293; this form, exact for data at a point, derived here).
* Without noise, what the states stray from the flow is the work of guidance (see `log_density`), and the eta that does
  that work over the step is 1 + work / (|eps|^2 ln(s / s')).
"""

import math
from dataclasses import dataclass, field

import torch

from .schedule import eps_from_denoised
from .divergence import probe_trace
from .log_density import LogDensityTrack, Sight, bits_of_state, log_prior, sin_theta
from .statistics import squared_norm
from .units import nats_to_bits_per_dim

FULL_NOISE = 0.2  # how far c^2 may be from 1, on average over a run, for the free log-density to be stated


@dataclass
class RunTrace:
    """Rows of a run, in the order of its steps; values per image. `add` at every step, then `rows`."""

    dim: int
    coordinates: object
    sigmas: list = field(default_factory=list)
    _last: tuple = None

    def __post_init__(self):
        self._track = LogDensityTrack(self.dim)
        self._work, self._noise, self._change = [], [], []
        self._start = None

    def add(self, x, denoised, sigma):
        """The state x (B, ...) at sigma, lower than before, and the unguided prediction there; copies of both are kept."""
        alpha = self.coordinates.alpha(sigma)
        eps = eps_from_denoised(x, denoised, sigma, alpha)
        before = self._track.strayed
        none = torch.zeros(len(x), device=x.device)
        self._track.add(x, sigma, alpha, Sight(denoised, none, none))
        if self._last is None:
            self._start = log_prior(x, sigma, alpha, Sight(denoised, none, none), denoised)[0]
        else:
            old_eps, old_denoised, old_sigma = self._last
            self._work.append(self._track.strayed - before)
            self._step(x, sigma, alpha, old_eps, old_denoised, old_sigma)
        self._last = eps, self._track.denoised, sigma
        self.sigmas.append(sigma)

    def _step(self, x, sigma, alpha, eps, denoised, old_sigma):
        held = (x - alpha * denoised) / sigma
        energy, held_energy = squared_norm(eps), squared_norm(held)
        kept = (probe_trace(eps, held) / energy.clamp_min(1e-30)).square()
        s, old_s = self.coordinates.s(sigma), self.coordinates.s(old_sigma)
        ratio = s / old_s if math.isfinite(old_s) else 0.0
        self._noise.append((1 - kept) / (1 - ratio**2))
        # of log p_u + D ln(sin(theta)), so that s = infinity does no harm
        self._change.append(-0.5 * (held_energy - energy).to(kept.dtype))

    def _mean_noise(self):
        """c^2 on average over steps and images, weighted by the precision with which each is known."""
        if not self._noise:
            return 0.0
        weight = torch.stack(self._track.eps_energy[:-1])
        return float((torch.stack(self._noise) * weight).sum() / weight.sum())

    def rows(self):
        """One dict a step: step, sigma, s (None: infinite), and lists over the images: eps_energy = ||eps||^2 / D, noise =
        c^2 of the step before; for a run without noise eta and shift (bits per dimension, what guidance did so far); for a
        run with full noise free_bits_per_dim."""
        noise = self._mean_noise()
        rows, shift, change = [], 0.0, 0.0
        for i, sigma in enumerate(self.sigmas):
            s = self._track.s[i]
            row = {"step": i, "sigma": sigma, "s": s if math.isfinite(s) else None,
                   "eps_energy": self._track.eps_energy[i].tolist()}
            if i:
                change = change + self._change[i - 1]
                row["noise"] = self._noise[i - 1].tolist()
                if noise < FULL_NOISE:
                    shift = shift + self._work[i - 1]
                    old = self._track.s[i - 1]
                    if math.isfinite(old):
                        able = self._track.eps_energy[i - 1] * self.dim * math.log(old / s)
                        row["eta"] = (1 + self._work[i - 1] / able).tolist()
                    row["shift"] = nats_to_bits_per_dim(shift, self.dim).tolist()
            if abs(noise - 1) < FULL_NOISE and math.isfinite(s):
                log_p_u = self._start + change + self.dim * math.log(sin_theta(self._track.s[0]) / sin_theta(s))
                row["free_bits_per_dim"] = bits_of_state(log_p_u, s, self.dim).tolist()
            rows.append(row)
        return rows

"""What a run of any sampler tells for free: from its states and the model's predictions there, nothing else.

A step of the host's samplers goes from (y, s) to (y', s') with the unguided prediction `denoised` at y. With that held
fixed over the step, eps' = (y' - denoised) / s' says what was done:

* s_down = s' <eps, eps'> / |eps|^2 is the part of s' that is old noise, to 1 / (|eps| sqrt(D)). The reverse SDE with
  noise c times its full strength has s_down^2 = s'^2 - c^2 s'^2 (1 - (s'/s)^2): so c^2 is known, 0 for an ODE sampler,
  1 for the full SDE.
* log p changes by -(|eps'|^2 - |eps|^2) / 2 + D ln(s / s') - (1 - c^2) tr Dhat ln(s / s'), to first order in the step:
  without any divergence where c = 1 (arXiv 2411.01293; this form, exact for data at a point, derived here).
* Without noise, the defect of the states against the flow is the work of guidance (see `log_density`), and the eta that does
  that work over the step is 1 + work / (|eps|^2 ln(s / s')).
"""

import math
from typing import Any

import torch

from .divergence import probe_trace
from .log_density import Evaluation, LogDensityTrack, bits_of_state, log_prior, sin_theta
from .schedule import Level, NoisePath
from .statistics import squared_norm
from .units import nats_to_bits_per_dim

FULL_NOISE = 0.2  # how far c^2 may be from 1, on average over a run, for the free log-density to be stated


class RunRecord:
    """Rows of a run, in the order of its steps; values per image. `add` at every step, then `rows`."""

    def __init__(self, path: NoisePath, dim: int):
        """dim: D, the number of elements of one image."""
        self.path, self.dim = path, dim
        self.sigmas: list[float] = []
        self._track = LogDensityTrack(path, dim)
        self._start = torch.zeros(())
        self._last: tuple[torch.Tensor, torch.Tensor, Level] | None = None  # eps, denoised and level
        self._work: list[torch.Tensor] = []
        self._noise: list[torch.Tensor] = []
        self._change: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, denoised: torch.Tensor, sigma: float) -> None:
        """The state x (B, ...) at sigma, lower than before, and the unguided prediction there; copies of both are kept."""
        level, before = self.path.at(sigma), self._track.defect
        none = torch.zeros(len(x), device=x.device)
        evaluation = Evaluation(denoised, none, none)
        self._track.add(x, sigma, evaluation)
        if self._last is None:
            self._start = log_prior(x, level, evaluation, denoised)[0]
        else:
            self._work.append(self._track.defect - before)
            self._step(x, level, *self._last)
        self._last = level.eps(x, denoised), self._track.denoised, level
        self.sigmas.append(sigma)

    def _step(self, x: torch.Tensor, level: Level, eps: torch.Tensor, denoised: torch.Tensor, old: Level) -> None:
        held = level.eps(x, denoised)
        energy, held_energy = squared_norm(eps), squared_norm(held)
        kept = (probe_trace(eps, held) / energy.clamp_min(1e-30)).square()
        ratio = level.s / old.s if math.isfinite(old.s) else 0.0
        self._noise.append((1 - kept) / (1 - ratio**2))
        # of log p_u + D ln(sin(theta)), so that s = infinity does no harm
        self._change.append(-0.5 * (held_energy - energy).to(kept.dtype))

    def _mean_noise(self) -> float:
        """c^2 on average over steps and images, weighted by the precision with which each is known."""
        if not self._noise:
            return 0.0
        weight = torch.stack(self._track.eps_energy[:-1])
        return float((torch.stack(self._noise) * weight).sum() / weight.sum())

    def rows(self) -> list[dict[str, Any]]:
        """One dict a step: step, sigma, s (None: infinite), and lists over the images: eps_energy = ||eps||^2 / D, noise =
        c^2 of the step before; for a run without noise eta and shift (bits per dimension, what guidance did so far); for a
        run with full noise free_bits_per_dim."""
        noise = self._mean_noise()
        rows: list[dict[str, Any]] = []
        shift, change = torch.zeros(()), torch.zeros(())
        for i, sigma in enumerate(self.sigmas):
            s = self._track.s[i]
            row = {
                "step": i,
                "sigma": sigma,
                "s": s if math.isfinite(s) else None,
                "eps_energy": self._track.eps_energy[i].tolist(),
            }
            if i:
                change = change + self._change[i - 1]
                row["noise"] = self._noise[i - 1].tolist()
                if noise < FULL_NOISE:
                    shift = shift + self._work[i - 1]
                    old = self._track.s[i - 1]
                    if math.isfinite(old):
                        room = self._track.eps_energy[i - 1] * self.dim * math.log(old / s)
                        row["eta"] = (1 + self._work[i - 1] / room).tolist()
                    row["shift"] = nats_to_bits_per_dim(shift, self.dim).tolist()
            if abs(noise - 1) < FULL_NOISE and math.isfinite(s):
                log_p_u = self._start + change + self.dim * math.log(sin_theta(self._track.s[0]) / sin_theta(s))
                row["free_bits_per_dim"] = bits_of_state(log_p_u, s, self.dim).tolist()
            rows.append(row)
        return rows

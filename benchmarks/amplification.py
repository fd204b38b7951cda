"""What the demo model makes of the amount that guidance adds, at converged settings: every run again at twice of everything.

    python3 run.py bench amplification

Writes docs/amplification.json. Half an hour on one core.
"""

import torch

from ..nodes.builtin import demo as demo_model
from ..nodes.host.noise_path import path_of
from ..nodes.host.scheduling import density_sigmas
from ..testing.demo_runs import Demo
from ..testing.measures import predicted_bits
from .pages import digest, publish, still_true
from .paper_experiments import guided

CODE = ["dg_core/*.py", "nodes/**/*.py", "testing/demo_runs.py"]
SEEDS = 14  # two of every class
QUANTILES = (0.05, 0.1, 0.3, 0.5, 0.7, 0.8)
EFFORTS = (32, 64)  # steps of the sampling, and evaluations of the readout


class Scheduled(Demo):
    """With the pack's own scheduler."""

    def sigmas(self, steps):
        return density_sigmas(self.model, steps, 1.0, self.latent)


def predicted(demo, quantile):
    """Bits per dimension that guidance itself adds at a quantile."""
    path = path_of(demo.model.get_model_object("model_sampling"))
    return predicted_bits(quantile, demo.latent["samples"][0].numel(), path, demo.sigmas(EFFORTS[0]))


def main():
    torch.set_num_threads(1)
    demo = Scheduled(SEEDS)
    results = still_true("amplification", CODE, weights=digest([demo_model.WEIGHTS]), seeds=SEEDS, efforts=list(EFFORTS))
    found = results.setdefault("quantiles", {})
    for quantile in QUANTILES:
        entry = found.setdefault(str(quantile), {"predicted": predicted(demo, quantile)})
        for effort in EFFORTS:
            if str(effort) not in entry:
                bits, errors = demo.bits(demo.run(guided(quantile), effort), effort)
                entry[str(effort)] = {"bits": [round(b, 4) for b in bits], "error": [round(e, 4) for e in errors]}
                print(quantile, effort, entry[str(effort)]["bits"], flush=True)
                publish("amplification", results)

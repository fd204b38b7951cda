"""Random numbers that depend on a key alone, drawn on the CPU, so that they are the same on every device."""

import numpy as np
import torch


def generator_of(*key: float) -> torch.Generator:
    """A generator whose numbers depend on the ints of the key, of up to 64 bits, and on their order."""
    state = np.random.SeedSequence([int(k) % 2**64 for k in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))

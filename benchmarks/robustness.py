"""Random runs of everything, each next to the same run without the pack: see testing/random_runs.py.

    python3 run.py bench robustness

5,000 runs. Writes docs/robustness.json. Ten to twenty minutes.
"""

import logging
import tempfile
import time
from collections import Counter

import folder_paths

from ..testing.random_runs import explore
from .pages import publish

EXAMPLES, PARTS = 5000, 10


def main():
    logging.disable(logging.WARNING)
    folder_paths.set_temp_directory(tempfile.mkdtemp())  # for the plots of curves
    start, found = time.time(), Counter()
    for part in range(1, PARTS + 1):
        found += explore(EXAMPLES // PARTS, part)
        print(f"part {part} of {PARTS}: {dict(found)}", flush=True)
    minutes = round((time.time() - start) / 60)
    publish("robustness", {"examples": sum(found.values()), "outcomes": dict(found), "minutes": minutes})

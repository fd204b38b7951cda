"""Whatever is combined: see benchmarks/robustness.py."""

from density_guidance.benchmarks import robustness

EXAMPLES = 500


def test_random_runs():
    """A clear error before any model call, or a finite picture; the host stays as it was."""
    seen = robustness.explore(EXAMPLES, derandomize=True)
    assert sum(seen.values()) >= EXAMPLES * 0.98
    assert seen["finite"] > EXAMPLES / 2 and seen["refused with a reason"] > 0, seen

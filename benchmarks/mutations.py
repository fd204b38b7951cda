"""Breaks the code in one place after another, and runs the tests that should notice.

    python3 run.py bench mutations

Each mutation is one line of the pack, changed in a copy of it. It counts as caught where a test fails. About 15 minutes on one
core; prints a line for each and ends with an error where one went unnoticed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from ..launcher.environment import PACK


class Mutation(NamedTuple):
    """file, before -> after, and the test files that should notice."""

    file: str
    before: str
    after: str
    tests: str


MUTATIONS = [
    # signs
    Mutation("dg_core/control.py", "eta = gain / eps_norm2", "eta = -gain / eps_norm2", "control"),
    Mutation("dg_core/variation.py", "a_1 = (-inner(", "a_1 = (inner(", "variation"),
    Mutation("dg_core/target.py", "(target - reference.end) / A", "(reference.end - target) / A", "density_target"),
    Mutation(
        "dg_core/log_density.py",
        "- self.dim * math.log(sin_theta(self.s[-1])",
        "+ self.dim * math.log(sin_theta(self.s[-1])",
        "log_density",
    ),
    Mutation("dg_core/alignment.py", "alignment.append(-divergence", "alignment.append(divergence", "score_alignment"),
    Mutation("dg_core/units.py", "return -bits * dim", "return bits * dim", "control"),
    # powers and factors
    Mutation("dg_core/control.py", "wanted = (2 * dim) ** 0.5 *", "wanted = (2 * dim) *", "one_gaussian host_sampling"),
    Mutation("dg_core/control.py", "/ std.square()", "/ std", "control"),
    Mutation("dg_core/divergence.py", "(above - below) / (2 * h)", "(above - below) / h", "divergence"),
    Mutation("dg_core/flow.py", "math.sin(level.theta) * eta", "math.cos(level.theta) * eta", "solver"),
    Mutation("dg_core/prior.py", "stats.chi.isf(", "stats.chi.ppf(", "prior_guidance"),
    # off by one, and order of the scheme
    Mutation("dg_core/control.py", "steps[0], steps[-1] + 1", "steps[0], steps[-1]", "control"),
    Mutation("dg_core/control.py", "(values[0] + values[-1]) / 2) / (len(values) - 1)", "0) / len(values)", "masks control"),
    Mutation("dg_core/adams.py", "nodes[:2] = nodes[1::-1]", "pass", "solver"),
    Mutation("dg_core/adams.py", "kept = kept * (", "kept = 1.0 * (", "stiff_flows"),
    Mutation("dg_core/variation.py", "max(self.steps.first, 1)", "max(self.steps.first, 0)", "variation"),
    # what belongs to which image or element
    Mutation(
        "nodes/host/steering.py", "[gain for gain, _ in gains]", "[gain for gain, _ in reversed(gains)]", "host_sampling masks"
    ),
    Mutation("nodes/host/masks.py", "mask = mask.unsqueeze(1)", "mask = mask.flip(0).unsqueeze(1)", "masks"),
    Mutation("dg_core/control.py", "noise.mul_(control.weights)", "noise.mul_(1)", "masks"),
    Mutation(
        "dg_core/variation.py",
        "across = noise - inner(noise, eps, weight)",
        "across = noise - 0 * inner(noise, eps, weight)",
        "variation",
    ),
    # precision, and what the host sees
    Mutation("dg_core/control.py", "wide = compute_dtype(x.dtype)", "wide = x.dtype", "control"),
    Mutation("dg_core/statistics.py", "return torch.promote_types(dtype, torch.float32)", "return dtype", "control"),
    Mutation(
        "nodes/host/steering.py",
        "change = self.unguided - self.guided",
        "change = self.guided - self.unguided",
        "host_sampling masks",
    ),
    Mutation(
        "nodes/host/wrappers.py",
        "{k: v for k, v in present.items() if k != WRAPPER_KEY}",
        "present",
        "model_access log_density",
    ),
]


def caught(mutation: Mutation, folder: Path) -> str:
    """The name of the first test that fails with the mutation in a copy of the pack in `folder`; "" where all pass."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutation.before) == 1, (
        f"{mutation.before!r} stands {text.count(mutation.before)} times in {mutation.file}"
    )
    path.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
    tests = folder / "tests"
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-c",
        str(tests / "pytest.ini"),
        "--rootdir",
        str(tests),
        "-x",
        "-q",
        "-p",
        "no:xdist",
        *(str(tests / f"test_{name}.py") for name in mutation.tests.split()),
    ]
    variables = {**os.environ, "DENSITY_GUIDANCE_COMFYUI": str(PACK / ".host" / "ComfyUI"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run(command, env=variables, capture_output=True, text=True)
    finally:
        path.write_text(text, encoding="utf-8")
    failures = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return failures[0].split(" - ")[0].split("::")[-1] if failures else ""


def main() -> None:
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pack"
        shutil.copytree(PACK, folder, ignore=shutil.ignore_patterns(".host", ".git", "__pycache__", "output"))
        for mutation in MUTATIONS:
            test = caught(mutation, folder)
            missed += not test
            print(f"{mutation.file}: {mutation.after!r}: {f'caught by {test}' if test else 'MISSED'}", flush=True)
    print(f"{len(MUTATIONS) - missed} of {len(MUTATIONS)} caught")
    if missed:
        raise SystemExit(1)

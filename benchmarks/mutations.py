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

from ..launcher.environment import PACK
from ..launcher.in_process import COMFYUI

# file | before | after | the test files that should notice
TABLE = """
# signs
dg_core/control.py | eta = gain / eps_norm2 | eta = -gain / eps_norm2 | control
dg_core/variation.py | a_1 = (-inner( | a_1 = (inner( | variation
dg_core/target.py | (target - reference.end) / A | (reference.end - target) / A | density_target
dg_core/log_density.py | - self.dim * math.log(sin_theta(self.s[-1]) | + self.dim * math.log(sin_theta(self.s[-1]) | log_density
dg_core/alignment.py | alignment.append(-divergence | alignment.append(divergence | score_alignment
dg_core/units.py | return -bits * dim | return bits * dim | control
# powers and factors
dg_core/control.py | wanted = (2 * dim) ** 0.5 * | wanted = (2 * dim) * | one_gaussian host_sampling
dg_core/control.py | / std.square() | / std | control
dg_core/divergence.py | (above - below) / (2 * h) | (above - below) / h | divergence
dg_core/flow.py | math.sin(level.theta) * eta | math.cos(level.theta) * eta | solver
dg_core/prior.py | stats.chi.isf( | stats.chi.ppf( | prior_guidance
# off by one, and order of the scheme
dg_core/control.py | steps[0], steps[-1] + 1 | steps[0], steps[-1] | control
dg_core/control.py | (values[0] + values[-1]) / 2) / (len(values) - 1) | 0) / len(values) | masks control
dg_core/adams.py | nodes[:2] = nodes[1::-1] | pass | solver
dg_core/adams.py | kept = kept * ( | kept = 1.0 * ( | stiff_flows
dg_core/variation.py | max(self.steps.first, 1) | max(self.steps.first, 0) | variation
# what belongs to which image or element
nodes/host/steering.py | [gain for gain, _ in gains] | [gain for gain, _ in reversed(gains)] | host_sampling masks
nodes/host/masks.py | mask = mask.unsqueeze(1) | mask = mask.flip(0).unsqueeze(1) | masks
dg_core/control.py | noise.mul_(control.weights) | noise.mul_(1) | masks
dg_core/variation.py | across = noise - inner(noise, eps, weight) | across = noise - 0 * inner(noise, eps, weight) | variation
# precision, and what the host sees
dg_core/control.py | wide = compute_dtype(x.dtype) | wide = x.dtype | control
dg_core/statistics.py | return torch.promote_types(dtype, torch.float32) | return dtype | control
nodes/host/steering.py | change = self.unguided - self.guided | change = self.guided - self.unguided | host_sampling masks
nodes/host/wrappers.py | {k: v for k, v in present.items() if k != WRAPPER_KEY} | present | model_access log_density
"""
MUTATIONS = [line.split(" | ") for line in TABLE.splitlines() if " | " in line]


def caught(file: str, before: str, after: str, tests: str, folder: Path) -> str:
    """The name of the first test that fails with the mutation in a copy of the pack in `folder`; "" where all pass."""
    path, root = folder / file, folder / "tests"
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {file}"
    path.write_text(text.replace(before, after), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "pytest", "-c", str(root / "pytest.ini"), "--rootdir", str(root), "-x", "-q"]
    command += ["-p", "no:xdist", *(str(root / f"test_{name}.py") for name in tests.split())]
    variables = {**os.environ, "DENSITY_GUIDANCE_COMFYUI": str(COMFYUI), "PYTHONDONTWRITEBYTECODE": "1"}
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
            test = caught(*mutation, folder)
            missed += not test
            print(f"{mutation[0]}: {mutation[2]!r}: {f'caught by {test}' if test else 'MISSED'}", flush=True)
    print(f"{len(MUTATIONS) - missed} of {len(MUTATIONS)} caught")
    if missed:
        raise SystemExit(1)

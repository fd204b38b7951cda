"""ruff and mypy find nothing; only with their versions in requirements-dev.txt, which are those in .host/."""

import subprocess
import sys

import pytest
from density_guidance.launcher.environment import HOME, PACK, link_folder
from density_guidance.launcher.in_process import COMFYUI, NAME

pytestmark = pytest.mark.skipif(COMFYUI.parent != HOME, reason="a ComfyUI that run.py has not made")


def finds_nothing(*command: str, folder=PACK) -> bool:
    """What it finds is printed."""
    return subprocess.run([sys.executable, "-P", "-m", *command], cwd=folder).returncode == 0


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command):
    assert finds_nothing("ruff", *command, ".")


def test_mypy(tmp_path, request):
    link_folder(PACK, tmp_path / NAME)  # where the pack has a package's name, as in ComfyUI it need not have
    settings = ["--config-file", str(PACK / "pyproject.toml"), "--cache-dir", str(request.config.cache.mkdir("mypy"))]
    packages = [argument for room in ("dg_core", "nodes") for argument in ("-p", f"{NAME}.{room}")]
    assert finds_nothing("mypy", *settings, *packages, folder=tmp_path)

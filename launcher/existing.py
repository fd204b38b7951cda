"""A ComfyUI that the user has already: found, checked, and lent this pack for one run without writing into it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .environment import PACK
from .errors import LauncherError
from .links import link_folder

GUEST = "density-guidance-demo"  # the pack's folder name there; unlike that of a copy installed in custom_nodes/
NEEDED = ("torch", "aiohttp", "psutil")  # of ComfyUI's requirements, those that the launcher uses


def check_comfyui(folder: Path) -> Path:
    """The absolute path of a ComfyUI folder.

    Raises:
        LauncherError: it is not one; the message says what is missing.
    """
    # These functions of os say no where one may not look; those of pathlib raise.
    for part, exists in (("main.py", os.path.isfile), ("custom_nodes", os.path.isdir)):
        if not exists(folder / part):
            raise LauncherError(
                f"--comfyui {folder}: there is no {part} in it that can be read. Give ComfyUI's own folder, the one with "
                "main.py and custom_nodes."
            )
    return folder.resolve()


def find_python(comfyui: Path, given: Path | None) -> Path:
    """The Python that runs this ComfyUI: the given one, else one of its virtual environments, else the current one.

    Raises:
        LauncherError: it lacks what ComfyUI needs.
    """
    environments = (
        comfyui / "venv",
        comfyui / ".venv",
        comfyui.parent / "python_embeded",
    )  # so spelled by the portable build
    candidates = [
        folder / name for folder in environments for name in ("bin/python", "Scripts/python.exe", "python.exe")
    ]
    found = next((path for path in candidates if path.is_file()), Path(sys.executable))
    # not resolve(): the symlink's own place is what makes it the virtual environment's Python
    python = Path(os.path.abspath(shutil.which(str(given)) or given if given else found))
    script = f"import importlib.util as u; print(*[m for m in {NEEDED!r} if u.find_spec(m) is None])"
    try:
        result = subprocess.run([str(python), "-c", script], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LauncherError(
            f"--python {python}: it does not run ({error}). Give the Python that starts your ComfyUI."
        ) from error
    if result.returncode or result.stdout.strip():
        lacks = result.stdout.strip() or result.stderr.strip()
        raise LauncherError(
            f"{'--python ' if given else ''}{python}: it lacks what ComfyUI needs ({lacks}). "
            "Give the Python that starts your ComfyUI with --python."
        )
    return python


def guest_arguments(scratch: Path) -> list[str]:
    """Arguments with which a ComfyUI loads this pack, and no other, from a link in `scratch`.

    Other packs are left out because they are not used and may be slow to start, change files or open ports.
    """
    nodes = scratch / "guest" / "custom_nodes"
    nodes.mkdir(parents=True)
    link_folder(PACK, nodes / GUEST)
    config = scratch / "guest" / "extra_model_paths.yaml"
    config.write_text(json.dumps({"density_guidance": {"base_path": str(nodes.parent), "custom_nodes": nodes.name}}))
    return ["--extra-model-paths-config", str(config), "--disable-all-custom-nodes", "--whitelist-custom-nodes", GUEST]

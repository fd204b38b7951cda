"""The real host and the pack in this process, for tests and benchmarks."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from .environment import HOME, PACK, LauncherError

COMFYUI = Path(os.environ.get("DENSITY_GUIDANCE_COMFYUI", HOME / "ComfyUI"))  # run.py sets it
NAME = "density_guidance"


def import_host():
    """Make `import comfy` work. The device is the CPU where there is no accelerator."""
    # With the pack's root on the path its folder `nodes` would hide the host's module `nodes`.
    sys.path[:] = [str(COMFYUI), *(entry for entry in sys.path if Path(entry or ".").resolve() != PACK)]
    from comfy.cli_args import args  # does not look at sys.argv unless the host's main.py asks it to

    args.cpu = not has_accelerator()  # before comfy.model_management, which fails without a GPU otherwise


def has_accelerator() -> bool:
    """Whether PyTorch has another device than the CPU. Raises LauncherError where it cannot be imported."""
    try:
        import torch
    except ImportError as error:
        raise LauncherError(f"PyTorch, which ComfyUI needs, cannot be imported: {error}") from error
    if hasattr(torch, "accelerator"):  # torch 2.6 or newer
        return torch.accelerator.is_available()
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def import_pack():
    """Load the pack by path, as the host does, under the name `density_guidance`, and return its module."""
    spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

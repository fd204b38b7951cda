"""Density Guidance for ComfyUI: exact control of how much detail a diffusion or flow model puts into an image."""

import importlib
import importlib.util
import os

from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


def _importable() -> str | None:
    """The name by which another process can import this pack. ComfyUI loads packs under their paths, which no process can; but
    raylight sends samplers to its workers."""
    folder = os.path.dirname(__file__)
    name = f"custom_nodes.{os.path.basename(folder)}"
    if os.sep not in __name__ or name.count(".") > 1:
        return None
    try:
        spec = importlib.util.find_spec(name)
    except ImportError:
        return None
    return name if spec and spec.origin and os.path.samefile(spec.origin, __file__) else None


if _name := _importable():
    NODES = importlib.import_module(_name).NODES
else:
    from .nodes import NODES


class DensityGuidanceExtension(ComfyExtension):
    async def get_node_list(self):
        return NODES


async def comfy_entrypoint():
    return DensityGuidanceExtension()

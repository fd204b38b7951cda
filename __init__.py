"""Density Guidance for ComfyUI: exact control of how much detail a diffusion or flow model puts into an image."""

from comfy_api.latest import ComfyExtension

from .nodes import NODES

WEB_DIRECTORY = "./web"


class DensityGuidanceExtension(ComfyExtension):
    async def get_node_list(self):
        return NODES


async def comfy_entrypoint():
    return DensityGuidanceExtension()

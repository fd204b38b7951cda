"""raylight sends a SAMPLER to workers that are other processes: it has to be found there, and to sample the same."""

import os
import subprocess
import sys

import pytest
from density_guidance.launcher.environment import PACK, link_folder
from density_guidance.launcher.in_process import COMFYUI

# Both processes have ComfyUI's folder on their path, as raylight arranges for its workers.
SCRIPT = """
import hashlib, importlib, importlib.util, pickle, sys
from pathlib import Path
root, comfyui, file, mode = sys.argv[1:]
sys.path[:0] = [root, comfyui]
from comfy.cli_args import args
args.cpu = True
import torch
torch.set_num_threads(1)
if mode == "sends":  # as ComfyUI loads a pack
    folder = f"{root}/custom_nodes/density-guidance"
    spec = importlib.util.spec_from_file_location(folder, f"{folder}/__init__.py", submodule_search_locations=[folder])
    sys.modules[folder] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    node = {node.define_schema().node_id: node for node in pack.NODES}
    from comfy.samplers import sampler_object
    guided = lambda **more: node["DensityGuidanceSampler"].execute(0.3, 0.1, 0.0, 1.0, **more)[0]
    made = {"own": guided(), "euler": guided(sampler=sampler_object("euler"), mask=torch.rand(1, 16, 16))}
    with open(file, "wb") as f:
        pickle.dump(made, f)
else:
    with open(file, "rb") as f:
        made = pickle.load(f)
runs = importlib.import_module("custom_nodes.density-guidance.testing.host_runs")
model = runs.exact_model("eps")
for name, sampler in made.items():
    found = runs.sampled(model, sampler, runs.schedule(model, 4))
    print(name, hashlib.sha256(found.numpy().tobytes()).hexdigest())
"""


@pytest.mark.skipif(os.name == "nt", reason="the name of a pack in ComfyUI, which is a path")
def test_samplers_travel_to_raylights_workers(tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    link_folder(PACK, tmp_path / "custom_nodes" / "density-guidance")
    said = []
    for mode in ("sends", "receives"):
        command = [sys.executable, "-P", "-c", SCRIPT, str(tmp_path), str(COMFYUI), str(tmp_path / "samplers"), mode]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        said.append(result.stdout.splitlines())
    assert said[0] == said[1] and [line.split()[0] for line in said[0]] == ["own", "euler"]
    assert len({line.split()[1] for line in said[0]}) == 2

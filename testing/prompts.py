"""Prompts for a server: the templates in the API's format, made small, and runs whose results are read back."""

import json

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from ..launcher.environment import PACK

SIZE = 32  # the smallest of the loader

WORKFLOWS = PACK / "workflows"


def read(name, folder=WORKFLOWS):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def api_workflow(name):
    return read(name, WORKFLOWS / "api")


def node_of(workflow, class_type):
    """The id of the one node of a class."""
    (found,) = [node_id for node_id, node in workflow.items() if node["class_type"] == class_type]
    return found


def inputs_of(workflow, class_type):
    return workflow[node_of(workflow, class_type)]["inputs"]


def made_small(workflow, steps=6):
    """The same nodes and links with few steps, levels and images of the smallest size."""
    small = {
        "size": lambda v: str(SIZE),
        "batch_size": lambda v: min(v, 2),
        "steps": lambda v: steps,
        "step": lambda v: steps - 1,
        "values": lambda v: ",".join(v.split(",")[:2]),
    }
    for node in workflow.values():
        for name, value in node["inputs"].items():
            if name in small and not isinstance(value, list):
                node["inputs"][name] = small[name](value)
    return workflow


def small_run(quantile, prefix, steps=4, batch_size=2, size=str(SIZE)):
    """One guided run that saves its latent and its images."""
    workflow = api_workflow("ksampler")
    inputs_of(workflow, "LoadExactDensityModel").update(size=size, batch_size=batch_size)
    inputs_of(workflow, "DensityGuidanceModel").update(quantile=quantile, detail_shift=0.0)
    inputs_of(workflow, "KSampler").update(steps=steps)
    inputs_of(workflow, "SaveImage").update(filename_prefix=prefix)
    workflow["latent"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": [node_of(workflow, "KSampler"), 0], "filename_prefix": prefix},
    }
    return workflow


def results_of(server, entry):
    """(latent, images) of a finished `small_run` that really sampled."""
    cached = [data["nodes"] for event, data in entry["status"]["messages"] if event == "execution_cached"]
    assert node_of(entry["prompt"][2], "KSampler") not in set().union(*cached)
    files = server.saved_files(entry)
    (latent,) = [load_file(path)["latent_tensor"] for path in files if path.suffix == ".latent"]
    images = [np.asarray(Image.open(path)) for path in files if path.suffix == ".png"]
    assert len(images) == len(latent)
    return latent, np.stack(images)

"""The pack in the oldest ComfyUI that it supports: see benchmarks/oldest_host.py."""

import json

import pytest
import torch
from density_guidance.benchmarks import oldest_host
from density_guidance.launcher.environment import PACK
from density_guidance.launcher.host import running_host
from density_guidance.testing.mixed_prompts import mixed_run
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group("server")  # one of them compares the two


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    with running_host(oldest_host.prepare(), tmp_path_factory.mktemp("output")) as host:
        yield host


def test_it_is_the_version_that_the_pack_names(oldest):
    assert oldest_host.version(oldest_host.prepare()) == oldest_host.VERSION
    assert f'requires-comfyui = ">={oldest_host.VERSION}"' in (PACK / "pyproject.toml").read_text()
    assert f"ComfyUI ({oldest_host.VERSION} or newer" in (PACK / "README.md").read_text()


def test_every_node_is_offered(oldest):
    assert oldest_host.missing_nodes(oldest) == []


def four_runs():
    """A prompt with a run without guidance, one with neutral settings, one guided by mask and curve, and that one traced."""
    graph = mixed_run(1)
    sampled = graph.pop("sampled")["inputs"]
    settings = {**graph.pop("sampler")["inputs"], "detail_shift": 0.0}
    graph["levels"] = {"class_type": "DensityLevels", "inputs": {"values": "1, 2"}}
    graph["neutral"] = {"class_type": "DensityGuidanceSampler", "inputs": {**settings, "quantile": 0.5}}
    graph["guided"] = {"class_type": "DensityGuidanceSampler", "inputs": {**settings, "quantile": 0.2, "curve": ["levels", 1]}}
    del graph["save"]
    for name in ("select", "neutral", "guided", "traced"):
        kind, more = "SamplerCustomAdvanced", {"sampler": [name, 0]}
        if name == "traced":
            kind, more = "DensityTrace", {"sampler": ["guided", 0], "exact_trace": False}
        graph[f"{name} sampled"] = {"class_type": kind, "inputs": {**sampled, **more}}
        graph[f"{name} saved"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [f"{name} sampled", 0], "filename_prefix": name},
        }
    return graph


def latents_of(host, graph):
    """{prefix: latent} of what a prompt saved."""
    files = host.saved_files(host.client.run(graph))
    return {path.name.split("_")[0]: load_file(path)["latent_tensor"] for path in files if path.suffix == ".latent"}


def test_neutral_and_guided_runs(oldest, server):
    """Neutral to the bit; guided as in the newer ComfyUI."""
    old, new = (latents_of(host, four_runs()) for host in (oldest, server))
    assert torch.equal(old["neutral"], old["select"]) and not torch.equal(old["guided"], old["select"])
    assert torch.equal(old["traced"], old["guided"])
    assert torch.allclose(old["guided"], new["guided"], atol=1e-5) and torch.isfinite(old["guided"]).all()


@pytest.mark.parametrize("number", [0, 2, 3])
def test_other_mixed_prompts(oldest, number):
    oldest.client.run(mixed_run(number))


def test_results_of_the_long_run():
    results = json.loads((PACK / "docs" / "oldest_host.json").read_text())
    assert results["comfyui"] == oldest_host.VERSION and results["missing_nodes"] == []
    assert results["templates"] == len(list((PACK / "workflows" / "api").glob("*.json"))) <= results["images"]

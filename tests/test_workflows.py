"""The templates and every node, in a real server: that they run, and that the numbers they show are true."""

import json
import math
import re
import time
import urllib.request

import numpy as np
import pytest
import torch
from density_guidance.dg_core.exact_density import ExactDensity
from density_guidance.launcher.client import WorkflowInterrupted, node_outputs
from density_guidance.launcher.environment import PACK
from density_guidance.nodes import NODES
from density_guidance.nodes.builtin import exact
from density_guidance.testing.host_runs import KINDS
from density_guidance.testing.prompts import (
    WORKFLOWS,
    api_workflow,
    inputs_of,
    made_small,
    node_of,
    read,
    results_of,
    small_run,
)
from PIL import Image
from safetensors.torch import load_file

TEMPLATES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
NODE_IDS = [node.define_schema().node_id for node in NODES]
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"Note", "MarkdownNote"}


def specs_in(info):
    """{input: [type, options]} of a node of /object_info, without those that the host fills in itself."""
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def inputs_in(info):
    """{input: options}."""
    return {name: dict(*options) for name, (_, *options) in specs_in(info).items()}


@pytest.fixture(scope="module")
def object_info(server):
    return server.client.object_info()


# --- templates and their API copies ---------------------------------------------------------------------------


def to_api(graph, object_info):
    """API format of a workflow in the web page's format without subgraphs, bypassed or muted nodes."""
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    api = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        assert node["mode"] == 0
        specs = specs_in(object_info[node["type"]])
        values = list(node.get("widgets_values", []))
        inputs = {}
        for name, (kind, *options) in specs.items():
            options = options[0] if options else {}
            if (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput"):
                inputs[name] = values.pop(0)
                if options.get("control_after_generate"):
                    assert values.pop(0) == "fixed"  # else every run of the template would differ
        assert not values, f"{node['type']} has more widget values than inputs"
        for slot in node["inputs"]:
            if slot["link"] is not None:
                inputs[slot["name"]] = links[slot["link"]]
        api[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return api


def as_the_server_sees_it(api, object_info):
    """Without titles, and without what the page shows on a node by itself, as the text on PreviewAny."""
    known = lambda node: {k: v for k, v in node["inputs"].items() if k in specs_in(object_info[node["class_type"]])}
    return {node_id: {"class_type": node["class_type"], "inputs": known(node)} for node_id, node in api.items()}


def test_there_are_the_templates_that_the_readme_names():
    assert {"detail_sweep", "quantile_sweep", "prior_guidance", "ksampler", "guide_any_sampler"} <= set(TEMPLATES)


def test_every_api_copy_has_its_template():
    assert sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json")) == TEMPLATES


@pytest.mark.parametrize("name", TEMPLATES)
def test_api_copy_is_that_of_the_template(name, object_info):
    assert as_the_server_sees_it(api_workflow(name), object_info) == to_api(read(name), object_info)


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_has_an_image_and_a_note(name):
    path = WORKFLOWS / f"{name}.jpg"
    assert path.stat().st_size < 150_000
    with Image.open(path) as image:
        assert image.format == "JPEG" and min(image.size) > 200
    assert any(node["type"] in NOTES for node in read(name)["nodes"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_nodes_of_a_template_do_not_overlap(name):
    title = 30
    boxes = [
        (n["pos"][0], n["pos"][1] - title, n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1]) for n in read(name)["nodes"]
    ]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def test_server_offers_the_templates(server):
    offered = get_json(server, "/workflow_templates")
    assert sorted(offered["density-guidance"]) == TEMPLATES


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_runs(name, server):
    """With its own nodes and links, at few steps and images of the smallest size."""
    entry = server.client.run(made_small(api_workflow(name), 3 if name == "trained_detail" else 6))
    assert entry["status"]["status_str"] == "success"
    saved = server.saved_files(entry)
    assert saved and all(path.stat().st_size > 0 for path in saved)


@pytest.mark.parametrize("prediction", KINDS)
def test_measured_change_of_detail_sweep_is_the_asked_for_one(prediction, server):
    """From the node's table, and again from the latents with nothing but dg_core."""
    workflow = api_workflow("detail_sweep")
    inputs_of(workflow, "LoadExactDensityModel").update(prediction=prediction, size="32", batch_size=2)
    workflow["latent"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": [node_of(workflow, "SamplerCustomAdvanced"), 0], "filename_prefix": "sweep"},
    }
    shifts = [float(word) for word in inputs_of(workflow, "DensityLevels")["values"].split(",")]
    entry = server.client.run(workflow)
    assert entry["status"]["status_str"] == "success"

    (shown,) = node_outputs(entry, "DensityContactSheet")
    table = np.array([row["bits_per_dim"] for row in json.loads(shown["table"][0])["rows"]])
    assert table.shape == (len(shifts), inputs_of(workflow, "LoadExactDensityModel")["batch_size"])
    np.testing.assert_allclose(table - table[shifts.index(0)], np.array(shifts)[:, None] * np.ones(table.shape[1]), atol=0.01)

    latents = [path for path in server.saved_files(entry) if path.suffix == ".latent"]
    assert len(latents) == len(shifts)
    s = last_noise_level(prediction, inputs_of(workflow, "BasicScheduler")["steps"])
    recomputed = np.array([exact_bits(load_file(path)["latent_tensor"], s) for path in latents])
    np.testing.assert_allclose(recomputed, table, atol=1e-6)


def last_noise_level(prediction, steps):
    """s where the sweep ends: the last sigma above 0 of the host's `simple` schedule, in VE coordinates."""
    import comfy.samplers

    sampling = exact.PREDICTIONS[prediction][1](exact.KINDS[exact.EMOJI](32)[2])
    sigma = float(comfy.samplers.calculate_sigmas(sampling, "simple", steps)[-2])
    return sigma / (1 - sigma) if prediction == "flow" else sigma


def exact_bits(samples, s):
    """Bits per dimension of images in [-1, 1] plus noise; a linear scaling of them is undone as the file says."""
    from safetensors import safe_open

    density = ExactDensity.load(exact.WEIGHTS, samples.shape[-1])
    with safe_open(exact.WEIGHTS, "pt") as file:
        shift, scale = file.get_tensor("shift").double(), float(file.get_tensor("scale"))
    return density.bits_per_dim((samples.double() - shift.view(1, -1, 1, 1)) * scale, s).numpy()


# --- nodes ----------------------------------------------------------------------------------------------------


def get(server, path):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.client.url + path, timeout=30) as answer:
        return answer.read().decode("utf-8")


def get_json(server, path):
    return json.loads(get(server, path))


def test_every_node_is_known_to_the_server(object_info):
    ours = {node_id for node_id, info in object_info.items() if "density-guidance" in info["python_module"]}
    assert ours == set(NODE_IDS) and len(NODE_IDS) == 16


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_node_describes_itself(node_id, object_info):
    info = object_info[node_id]
    assert info["category"] == "sampling/density guidance"
    assert len(info["description"]) > 30
    assert info["display_name"] not in ("", node_id)
    for name, options in inputs_in(info).items():
        assert len(options.get("tooltip", "")) > 10, f"input {name} has no tooltip"
    assert info["output"] and len(info["output_tooltips"]) == len(info["output"])
    assert all(len(tooltip or "") > 10 for tooltip in info["output_tooltips"])


# Where the maths has a symbol for a socket, its tooltip names it.
SYMBOLS = {
    "quantile": "q",
    "quantiles": "q",
    "detail_shift": "-log2 p / D",
    "detail_shifts": "-log2 p / D",
    "bits_per_dim": "-log2 p / D",
    "target": "-log2 p / D",
    "mask": "w",
    "strength": "c",
    "sigmas": "sigma",
    "noise_floor": "s = sigma / alpha",
    "scale_step": "h",
    "steps": "N",
}
UNIT = re.compile("[Nn]o unit|[Bb]its per dimension|pixels|[Ss]hare of the sampling|[Nn]umber of|[Ss]eed")


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_tooltips_name_symbol_unit_and_neutral_value(node_id, object_info):
    info = object_info[node_id]
    for name, options in inputs_in(info).items():
        tooltip, kind = options["tooltip"], specs_in(info)[name][0]
        assert re.search(rf"(?<![a-z]){re.escape(SYMBOLS.get(name, ''))}(?![a-z])", tooltip), f"{name} has no symbol"
        if "default" in options and kind != "STRING":
            assert kind not in ("INT", "FLOAT") or UNIT.search(tooltip), f"{name} has no unit"
            assert "Default: " in tooltip or "Neutral: any" in tooltip, f"{name} has no default"
        elif name in info["input"].get("optional", {}) and kind != "STRING":
            assert "Not connected: " in tooltip, f"{name} does not say what it is without a link"
    for name, tooltip in zip(info["output_name"], info["output_tooltips"], strict=True):
        assert SYMBOLS.get(name, "") in tooltip, f"output {name} has no symbol"


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_node_has_a_page_of_documentation(node_id, server, object_info):
    """Under the address where the web page looks for it; it names every input and output."""
    text = get(server, f"/extensions/density-guidance/docs/{node_id}.md")
    assert text == (PACK / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    info = object_info[node_id]
    names = [*inputs_in(info), *info["output_name"]]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_english_texts_are_served(server):
    """They are those of the declared inputs (tests/test_inputs.py)."""
    served = get_json(server, "/i18n")["en"]["nodeDefs"]
    written = json.loads((PACK / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    assert {node_id: served[node_id] for node_id in NODE_IDS} == written


def shape_of(texts):
    return {key: shape_of(value) for key, value in texts.items()} if isinstance(texts, dict) else ""


@pytest.mark.parametrize("language", sorted(path.name for path in (PACK / "locales").iterdir()))
def test_language_is_complete(language, server):
    """Every text is there, none is empty, and none has a character that the web page's translation gives a meaning."""
    served = get_json(server, "/i18n")[language]
    ours = {node_id: served["nodeDefs"][node_id] for node_id in NODE_IDS}
    assert shape_of(ours) == shape_of(json.loads((PACK / "locales/en/nodeDefs.json").read_text(encoding="utf-8")))
    assert '""' not in json.dumps(ours)
    assert not set("{}@|") & set("".join(texts_of(ours)))
    assert {"nodeCategories", "dataTypes"} <= set(served)


def texts_of(value):
    return [text for part in value.values() for text in texts_of(part)] if isinstance(value, dict) else [value]


# --- many prompts, and interrupts -----------------------------------------------------------------------------


def test_queued_prompts_do_not_touch_each_other(server):
    quantiles = [round(0.01 + 0.06 * (i * 7 % 16), 3) for i in range(16)]  # neighbours far apart
    entries = server.client.queue_many(small_run(q, f"many_{i}") for i, q in enumerate(quantiles))
    assert [entry["status"]["status_str"] for entry in entries] == ["success"] * 16
    together = [results_of(server, entry) for entry in entries]
    assert len({latent.numpy().tobytes() for latent, _ in together}) == 16  # the quantile did something

    for i in (11, 3, 15):
        forget_everything(server)
        latent, images = results_of(server, server.client.run(small_run(quantiles[i], f"alone_{i}")))
        assert torch.equal(latent, together[i][0]), f"quantile {quantiles[i]}"
        assert (images == together[i][1]).all()


def forget_everything(server):
    """Empty the server's cache of node outputs and unload its models."""
    request = urllib.request.Request(
        server.client.url + "/free",
        json.dumps({"unload_models": True, "free_memory": True}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30).close()


def long_run(kind):
    """400 steps of 24 images: with the pack's own solver, or as a patched model in KSampler."""
    if kind == "model":
        return small_run(0.3, "long", steps=400, batch_size=24, size="64")
    workflow = api_workflow("detail_sweep")
    inputs_of(workflow, "LoadExactDensityModel").update(size="64", batch_size=24)
    inputs_of(workflow, "BasicScheduler").update(steps=400)
    inputs_of(workflow, "SplitSigmas").update(step=399)
    return workflow


@pytest.mark.parametrize("kind", ["model", "solver"])
def test_interrupt_stops_within_one_step_and_the_server_goes_on(kind, server):
    steps, seen, told = [], [], []

    def watch(progress):
        if progress.steps > 100:
            steps.append(progress.step)
            seen.append(time.monotonic())
            if len(steps) == 3:
                server.client.interrupt()
                told.append(time.monotonic())

    with pytest.raises(WorkflowInterrupted):
        server.client.run(long_run(kind), watch)
    # Steps that ended while the request was under way do not count.
    under_way = math.ceil((told[0] - seen[2]) / (seen[2] - seen[1]))
    assert steps[2] <= steps[-1] <= steps[2] + under_way + 1, (steps, under_way)
    assert steps[-1] < 20, steps
    entry = server.client.run(small_run(0.4, f"after_{kind}"))
    assert entry["status"]["status_str"] == "success"

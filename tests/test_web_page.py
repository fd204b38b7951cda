"""The templates and the nodes' documentation in ComfyUI's own web page, in a headless Chromium."""

import json
from pathlib import Path

import pytest
from density_guidance.nodes.host.plots import curve_image
from density_guidance.testing.mixed_prompts import mixed_run
from density_guidance.testing.web_page import find_chromium, with_page

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs the program chromium on PATH")

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows"
TEMPLATES = sorted(WORKFLOWS.glob("*.json"))
HELP = ".node-help-content"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def seen(server):
    """What the page makes of each template, and shows of the documentation: one start of Chromium for all tests."""

    async def look(page):
        found = {"images": {}, "templates": {}, "help": {}}
        for path in TEMPLATES:  # an empty profile is greeted with the templates
            found["images"][path.stem] = await width_of_image(page, path.stem)
        for path in TEMPLATES:
            missing = await page.load(read(path))
            found["templates"][path.stem] = {"missing": missing, "api": await page.to_api()}
        for name in ("DensityGuidanceSampler", "ExactLogDensity"):
            found["help"][name] = await show_help(page, name)
        found["curve"] = await curve_in_the_node(page)
        return found

    return with_page(server.client.url, look)


async def width_of_image(page, name):
    """Of a template's card; the page has the images only of those cards that are scrolled into view."""
    card = f"document.querySelector('[data-testid=\"template-workflow-{name}\"]')"
    await page.wait_for(f"Boolean({card})")
    await page.evaluate(f"{card}.scrollIntoView({{behavior: 'instant', block: 'center'}})")
    return await page.wait_for(f"{card}.querySelector('img')?.naturalWidth")


async def curve_in_the_node(page):
    """Sizes of the images in two guidance nodes, the first with a curve and the second without, after a run."""
    graph = mixed_run(1)
    sampler = graph["sampler"]["inputs"]
    graph |= {
        name: {"class_type": kind, "inputs": inputs}
        for name, kind, inputs in (
            ("levels", "DensityLevels", {"values": "0, 2, 1"}),
            ("even", "DensityGuidanceSampler", {**sampler, "sampler": ["sampler", 0]}),
            ("decode", "VAEDecode", {"samples": ["sampled", 0], "vae": ["load", 1]}),
            ("show", "PreviewImage", {"images": ["decode", 0]}),
        )
    }
    sampler["curve"] = ["levels", 1]
    graph["sampled"]["inputs"]["sampler"] = ["even", 0]
    await page.evaluate(f"app.loadApiJson({json.dumps(graph)}, 'curve')")
    await page.evaluate("app.queuePrompt(0)")
    images = (
        "app.graph.nodes.filter(node => node.type === '{}').flatMap(node => node.imgs ?? [])"
        ".filter(img => img.complete && img.naturalWidth)"
    ).format
    await page.wait_for(f"{images('PreviewImage')}.length && {images('DensityGuidanceSampler')}.length")
    return await page.evaluate(f"{images('DensityGuidanceSampler')}.map(img => [img.naturalWidth, img.naturalHeight])")


async def show_help(page, name):
    """Select a new node of the class, click its info button, and return the text that comes up."""
    await page.evaluate(f"""(() => {{
        const node = LiteGraph.createNode("{name}")
        app.graph.add(node)
        app.canvas.selectNode(node)
    }})()""")
    button = "document.querySelector('[data-testid=info-button]')"
    await page.wait_for(f"Boolean({button})")
    await page.evaluate(f"{button}.click()")
    heading = f"LiteGraph.registered_node_types['{name}'].title"
    await page.wait_for(f"document.querySelector('{HELP} h1')?.innerText === {heading}")
    await page.wait_for(f"[...document.querySelectorAll('{HELP} img')].every(img => img.naturalWidth > 0)")
    text = await page.evaluate(f"document.querySelector('{HELP}').innerText")
    await page.evaluate("app.canvas.deselectAll()")
    await page.evaluate(f"{button}?.click()")
    return text


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_page_opens_the_template_and_makes_its_api_copy(path, seen):
    assert seen["templates"][path.stem]["missing"] == []
    copy = seen["templates"][path.stem]["api"]
    for node in copy.values():
        if node["class_type"] == "PreviewAny":
            node["inputs"].pop("preview", None)  # the page's own widget, which the node does not have
    assert copy == read(WORKFLOWS / "api" / path.name)


def test_page_shows_the_images_of_the_templates(seen):
    assert set(seen["images"]) == {path.stem for path in TEMPLATES}
    assert all(width > 200 for width in seen["images"].values())


@pytest.mark.parametrize(
    ("name", "words"),
    [("DensityGuidanceSampler", "bits per dimension = -nats / (D ln 2)"), ("ExactLogDensity", "The sigmas must end above 0.")],
)
def test_page_shows_the_documentation(name, words, seen):
    assert words in seen["help"][name]


def test_node_shows_its_curve(seen):
    """One of two nodes has a curve, and that one an image."""
    height, width = curve_image((0.0, 2.0, 1.0)).shape[1:3]
    assert seen["curve"] == [[width, height]]

"""Makes, from each template in workflows/ (the web page's format), its API copy and its image.

    python3 run.py bench make_templates

Each template first gets the pack's name and version on the pack's nodes, so that a page without the pack can say what is
missing. It is opened in ComfyUI's own web page, which makes the API copy (workflows/api/NAME.json); that is queued, and what
it saves becomes workflows/NAME.jpg. Edit a template in the web page, save it there, then run this. Some of the images are
also shown by the nodes' documentation, which can only show what lies beside it.

Needs the program chromium on PATH. Takes half a minute.
"""

import json
import shutil
import tempfile
from pathlib import Path

import tomllib
from PIL import Image

from ..launcher.environment import PACK, environment
from ..launcher.host import running_host
from ..nodes import NODES
from ..testing.web_page import with_page

WORKFLOWS = PACK / "workflows"
IN_DOCUMENTATION = ("detail_sweep", "score_alignment", "vary_texture", "vary_structure")
SIZE = (512, 656)  # at most, in pixels
MARGIN = 8


def main():
    paths = sorted(WORKFLOWS.glob("*.json"))
    for path in paths:
        path.write_text(named(path.read_text(encoding="utf-8")), encoding="utf-8")
    with tempfile.TemporaryDirectory() as output, running_host(environment(), Path(output)) as host:
        for path, api in zip(paths, with_page(host.client.url, lambda page: convert(page, paths)), strict=True):
            without_shown(api, host.client.object_info())
            text = json.dumps(api, indent=2, ensure_ascii=False) + "\n"
            (WORKFLOWS / "api" / path.name).write_text(text, encoding="utf-8")
            saved = host.saved_files(host.client.run(api))
            preview(saved).save(path.with_suffix(".jpg"), quality=88, optimize=True)
            print(f"{path.stem}: {len(api)} nodes, {len(saved)} saved", flush=True)
    for name in IN_DOCUMENTATION:
        shutil.copy(WORKFLOWS / f"{name}.jpg", PACK / "web" / "docs")


def named(text):
    """The text of a template whose nodes of this pack name it, with its version, as the page does for nodes of the registry."""
    project = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = {node.define_schema().node_id for node in NODES}
    graph = json.loads(text)
    for node in graph["nodes"]:
        if node["type"] in ours:
            node["properties"] |= {"cnr_id": project["name"], "ver": project["version"]}
    indent = len(text.split("\n")[1]) - len(text.split("\n")[1].lstrip())
    return json.dumps(graph, indent=indent, ensure_ascii=False) + "\n"


def without_shown(api, object_info):
    """Take out of an API copy what the page shows on a node by itself, as the text on PreviewAny: no input of the host."""
    for node in api.values():
        kinds = object_info[node["class_type"]]["input"].values()
        node["inputs"] = {name: value for name, value in node["inputs"].items() if any(name in kind for kind in kinds)}


async def convert(page, paths):
    """The API format of each template."""
    results = []
    for path in paths:
        if missing := await page.load(json.loads(path.read_text(encoding="utf-8"))):
            raise ValueError(f"{path.name}: the page shows these nodes as missing or in error: {', '.join(missing)}")
        results.append(await page.to_api())
    return results


def preview(files):
    """What was saved, small, on one sheet."""
    images = [Image.open(file).convert("RGB") for file in files]
    if len(images) == 1:
        small = images[0]
        small.thumbnail(SIZE, Image.LANCZOS)
        return small
    # Sheets go below each other, single images in two columns.
    columns = 1 if max(image.width / image.height for image in images) > 1.5 else 2
    width = (SIZE[0] - (columns - 1) * MARGIN) // columns
    height = round(width * images[0].height / images[0].width)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (SIZE[0], rows * (height + MARGIN) - MARGIN), "white")
    for i, image in enumerate(images):
        # Small images stay pixels: smoothing would hide the detail that they are about.
        method = Image.NEAREST if image.width < width else Image.LANCZOS
        place = i % columns * (width + MARGIN), i // columns * (height + MARGIN)
        sheet.paste(image.resize((width, height), method), place)
    return sheet

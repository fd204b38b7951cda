#!/usr/bin/env python3
"""Makes, from each template in workflows/ (the web page's format), its API copy and its picture.

    .host/venv/bin/python benchmarks/make_templates.py [NAME ...]

Each template is opened in ComfyUI's own web page, which makes the API copy (workflows/api/NAME.json); that is queued,
and what it saves becomes workflows/NAME.jpg. Edit a template in the web page, save it there, then run this.

Needs `.host/` (made by `python3 run.py demo`) and the program chromium on PATH. Takes about a minute.
"""

import json
import sys
import tempfile
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
sys.path[0] = str(PACK)  # for launcher and benchmarks; nothing of ComfyUI is imported here

from PIL import Image

from benchmarks.web_page import with_page
from launcher.environment import environment
from launcher.host import running_host

WORKFLOWS = PACK / "workflows"
PICTURE = (512, 656)  # at most, in pixels
MARGIN = 8


def main(names):
    paths = [path for path in sorted(WORKFLOWS.glob("*.json")) if not names or path.stem in names]
    if not paths:
        sys.exit(f"There is no template named {' or '.join(names)} in {WORKFLOWS}.")
    with tempfile.TemporaryDirectory() as output, running_host(environment(), Path(output)) as host:
        for path, api in zip(paths, with_page(host.client.url, lambda page: convert(page, paths)), strict=True):
            text = json.dumps(api, indent=2, ensure_ascii=False) + "\n"
            (WORKFLOWS / "api" / path.name).write_text(text, encoding="utf-8")
            saved = host.saved_files(host.client.run(api))
            picture(saved).save(path.with_suffix(".jpg"), quality=88, optimize=True)
            print(f"{path.stem}: {len(api)} nodes, {len(saved)} saved")


async def convert(page, paths):
    """The API format of each template."""
    results = []
    for path in paths:
        if missing := await page.load(json.loads(path.read_text(encoding="utf-8"))):
            raise ValueError(f"{path.name}: the page shows these nodes as missing or in error: {', '.join(missing)}")
        results.append(await page.to_api())
    return results


def picture(files):
    """The saved contact sheet, or several pictures in a row of two columns, small."""
    images = [Image.open(file).convert("RGB") for file in files]
    if len(images) == 1:
        small = images[0]
        small.thumbnail(PICTURE, Image.LANCZOS)
        return small
    side = (PICTURE[0] - MARGIN) // 2
    rows = -(-len(images) // 2)
    sheet = Image.new("RGB", (PICTURE[0], rows * (side + MARGIN) - MARGIN), "white")
    for i, image in enumerate(images):
        # Small pictures stay pixels: smoothing would hide the detail that they are about.
        method = Image.NEAREST if image.width < side else Image.LANCZOS
        sheet.paste(image.resize((side, side), method), (i % 2 * (side + MARGIN), i // 2 * (side + MARGIN)))
    return sheet


if __name__ == "__main__":
    main(sys.argv[1:])

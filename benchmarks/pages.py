"""Fills the marks of docs/*.md and of the README from docs/*.json.

    python3 run.py bench pages

The text of a page is written in the page; a benchmark writes its json and its figure, then calls `publish`.
"""

import hashlib
import json
from io import StringIO

from ..launcher.environment import PACK
from . import tables

DOCS = PACK / "docs"
NOT_MEASURED = "*Not measured yet.*"


def read(name):
    """What a benchmark wrote, or None."""
    path = DOCS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def digest(paths):
    """SHA-256 of the files' contents."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def still_true(name, patterns, **head):
    """What a benchmark wrote, where it was measured with the same `head` and code; else these alone.

    patterns: of the files, from the pack's folder, that the results depend on.
    """
    head |= {"code": digest(sorted(file for pattern in patterns for file in PACK.glob(pattern)))}
    results = read(name) or {}
    return results if {key: results.get(key) for key in head} == head else head


def pages():
    """The files with marks."""
    return [path for path in (PACK / "README.md", *sorted(DOCS.glob("*.md"))) if "[[[cog" in path.read_text(encoding="utf-8")]


def render(path):
    """The text of a page with every table made anew."""
    from cogapp import Cog  # a tool of the developers': what only measures does without

    cog, text = Cog(), StringIO()

    def show(markdown):
        cog.cogmodule.out(f"\n{markdown}\n\n")

    def table(name, kind):
        results = read(name)
        show(getattr(tables, f"{name}_{kind}")(results) if results else NOT_MEASURED)

    def summary():
        show(tables.summary(read))

    cog.process_file(StringIO(path.read_text(encoding="utf-8")), text, path.name, {"table": table, "summary": summary})
    return text.getvalue()


def publish(name=None, results=None, indent=1):
    """Write docs/name.json, where there is something to write, and then the pages."""
    if name:
        (DOCS / f"{name}.json").write_text(json.dumps(results, indent=indent) + "\n", encoding="utf-8")
    for path in pages():
        path.write_text(render(path), encoding="utf-8")


def main():
    publish()

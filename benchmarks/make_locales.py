"""Makes the English locale and the tables of the help pages from the nodes' inputs and outputs.

    python3 run.py bench make_locales

The other languages, and the rest of the help pages, are written by hand.
"""

import json
from pathlib import Path

from ..launcher.environment import PACK
from ..nodes import NODES

ENGLISH = PACK / "locales" / "en" / "nodeDefs.json"
BEGIN = "<!-- Up to the end mark made by: python3 run.py bench make_locales -->"
END = "<!-- end -->"


def locale() -> str:
    """The text of the English locale."""
    definitions = {}
    for node in NODES:
        schema = node.define_schema()
        definitions[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs},
            "outputs": {str(n): {"name": o.display_name, "tooltip": o.tooltip} for n, o in enumerate(schema.outputs)},
        }
    return json.dumps(definitions, indent=2, ensure_ascii=False) + "\n"


def tables(node) -> str:
    """The tables of a node's inputs and outputs, in Markdown."""
    outputs = [f"| `{o.display_name}` | {o.tooltip} |" for o in node.define_schema().outputs]
    return "\n".join(
        [
            "## Inputs\n",
            "| input | meaning |",
            "|---|---|",
            *(declared.row for declared in node.INPUTS),
            "\n## Outputs\n",
            "| output | meaning |",
            "|---|---|",
            *outputs,
        ]
    )


def help_page(node) -> tuple[Path, str]:
    """(path, text) of a node's help page, with what lies between its marks made anew; ValueError without marks."""
    path = PACK / "web" / "docs" / f"{node.define_schema().node_id}.md"
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} does not have the marks {BEGIN} and {END}")
    return path, f"{before}{BEGIN}\n\n{tables(node)}\n\n{END}{after}"


def main():
    for path, text in [(ENGLISH, locale()), *map(help_page, NODES)]:
        path.write_text(text, encoding="utf-8")
        print(path)

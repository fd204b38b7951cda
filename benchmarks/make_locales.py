"""Makes locales/en/nodeDefs.json from the nodes' schemas.

    python3 run.py bench make_locales

The other languages are written by hand; tests/test_workflows.py checks that they are complete.
"""

import json
from pathlib import Path

from ..nodes import NODES

ENGLISH = Path(__file__).resolve().parent.parent / "locales" / "en" / "nodeDefs.json"


def main():
    definitions = {}
    for node in NODES:
        schema = node.define_schema()
        definitions[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {i.id: {"name": i.id, "tooltip": i.tooltip} for i in schema.inputs},
            "outputs": {str(n): {"name": o.display_name, "tooltip": o.tooltip} for n, o in enumerate(schema.outputs)},
        }
    ENGLISH.write_text(json.dumps(definitions, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(ENGLISH)

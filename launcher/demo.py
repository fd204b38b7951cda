"""The demo: 4 seeds by 5 density levels from the built-in model, and the bits per dimension that they cost."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path

from .client import node_outputs
from .environment import PACK, Environment
from .errors import LauncherError
from .host import running_host
from .progress import ProgressLine

WORKFLOW = PACK / "workflows" / "api" / "detail_sweep.json"
SHEET = "DensityContactSheet"


def run_demo(where: Environment, output: Path, guest: bool) -> None:
    """Start ComfyUI, queue the workflow, show its progress, end ComfyUI, print the table.

    Args:
        output: folder for the contact sheet.
        guest: the ComfyUI is the user's.

    Raises:
        LauncherError: ComfyUI did not start, or ended while it ran.
        WorkflowError: a node failed.
    """
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    start = time.monotonic()
    print(f"Starting ComfyUI ({where.comfyui}) ...", flush=True)
    with running_host(where, output, guest) as host:
        print(f"It answers at {host.client.url} after {time.monotonic() - start:.0f} s. Queued {WORKFLOW.name}:")
        with closing(ProgressLine()) as show:
            try:
                entry = host.client.run(workflow, show)
            except ConnectionError as error:
                raise LauncherError(f"{error}\nThe end of ComfyUI's log:\n{host.log_tail()}") from error
        sheets = [path for path in host.saved_files(entry) if path.is_file()]
    print(f"ComfyUI has ended. All of it took {time.monotonic() - start:.0f} s.\n")
    for sheet in node_outputs(entry, SHEET):
        print(table_text(json.loads(sheet["table"][0])), end="\n\n")
    print("Contact sheet:", *sheets)


def table_text(table: dict) -> str:
    """The table of bits per dimension as text: a row for each density level, a column for each seed, and the mean.

    Args:
        table: {"rows": [{"label": ..., "bits_per_dim": [a number for each column]}, ...], "columns": [label, ...]}
    """
    head = ["bits per dimension", *table["columns"], "mean"]
    lines = [head]
    for row in table["rows"]:
        bits = row["bits_per_dim"]
        lines.append([row["label"], *(f"{value:.3f}" for value in (*bits, sum(bits) / len(bits)))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)

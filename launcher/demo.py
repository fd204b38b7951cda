"""The demo: 4 seeds by 5 density levels from each built-in model, and the bits per dimension of each image."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from .client import Progress, node_outputs
from .environment import PACK, Environment, LauncherError
from .host import running_host

# of the trained model and of the one whose density is known exactly
WORKFLOWS = [PACK / "workflows" / "api" / name for name in ("trained_detail.json", "detail_sweep.json")]
SHEET = "DensityContactSheet"
PARTS = 4  # lines of progress for each node


def run_demo(where: Environment, output: Path) -> None:
    """Make the contact sheets in the folder `output`, showing progress, and print their tables.

    Raises LauncherError where ComfyUI did not start or ended while it ran, and WorkflowError where a node failed.
    """
    start = time.monotonic()
    print(f"Starting ComfyUI ({where.comfyui}) ...", flush=True)
    tables, sheets = [], []
    with running_host(where, output) as host:
        print(f"It answers at {host.client.url} after {time.monotonic() - start:.0f} s.")
        for path in WORKFLOWS:
            print(f"Queued {path.name}:", flush=True)
            try:
                entry = host.client.run(json.loads(path.read_text(encoding="utf-8")), progress_printer())
            except ConnectionError as error:
                raise LauncherError(f"{error}\nThe end of ComfyUI's log:\n{host.log_tail()}") from error
            tables += [sheet["table"][0] for sheet in node_outputs(entry, SHEET)]
            sheets += [file for file in host.saved_files(entry) if file.is_file()]
    print(f"ComfyUI has ended. All of it took {time.monotonic() - start:.0f} s.\n")
    for table in tables:
        print(table_text(json.loads(table)), end="\n\n")
    print("Contact sheets:", *sheets, sep="\n")


def progress_printer() -> Callable[[Progress], None]:
    """A function that prints a line for each node of a run, and for each quarter of its steps."""
    told = None

    def show(progress: Progress) -> None:
        nonlocal told
        part = (progress.node_id, progress.step * PARTS // progress.steps if progress.steps else 0)
        if part != told:
            print(f"  {progress}", flush=True)
        told = part

    return show


def table_text(table: dict) -> str:
    """As text, with means: {"rows": [{"label": ..., "bits_per_dim": [a number for each column]}, ...], "columns": [...]}."""
    lines = [["bits per dimension", *table["columns"], "mean"]]
    for row in table["rows"]:
        bits = row["bits_per_dim"]
        lines.append([row["label"], *(f"{value:.3f}" for value in (*bits, sum(bits) / len(bits)))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)

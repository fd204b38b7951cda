"""One workflow with many settings, on as many ComfyUIs as Ray has room for: `run.py sweep`.

    DIR/sweep.json      which sweep it is
    DIR/<id>/           of each prompt that has run: row.json and what it saved; id: SHA-256 of its graph
    DIR/table/          Parquet files: the same rows
    DIR/.incoming/      what runs now; a folder is renamed to <id> when it is complete, so a half-made one is never seen

Ray Data hands out the prompts, starts workers anew and repeats what they held. What has a folder has run: that is all that
resuming needs, be it the driver, a worker or a whole machine that died. Ray stands in `sweep_workers`; nothing here needs it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from .environment import LauncherError

ID = re.compile("[0-9a-f]{64}")


# --- what is asked for -----------------------------------------------------------------------------------------------


def plan(path: Path, sets: list[str], zipped: bool = False) -> tuple[list[dict], list[dict]]:
    """(axes, prompts) of `--set NODE.INPUT=VALUES ...`: an axis has `label` and `values`, a prompt `id`, `settings`, `graph`.

    Raises LauncherError that says what is wrong with the workflow or a setting.
    """
    workflow = _workflow(path)
    axes = [_axis(workflow, text) for text in sets]
    if len({(axis["node"], axis["input"]) for axis in axes}) < len(axes):
        raise LauncherError("--set: one input is set twice.")
    counts = [len(axis["values"]) for axis in axes]
    if zipped and len(set(counts)) > 1:
        raise LauncherError(f"--zip pairs the values of all --set, and there are {', '.join(map(str, counts))} of them.")
    prompts = {}
    for values in (zip if zipped else itertools.product)(*(axis["values"] for axis in axes)):
        graph = dict(workflow)
        for axis, value in zip(axes, values):
            node = graph[axis["node"]]
            graph[axis["node"]] = {**node, "inputs": {**node["inputs"], axis["input"]: value}}
        settings = {axis["label"]: value for axis, value in zip(axes, values)}
        prompts.setdefault(prompt_id(graph), {"settings": settings, "graph": graph})
    return axes, [{"id": key, **prompt} for key, prompt in prompts.items()]


def prompt_id(graph: dict) -> str:
    return hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()


def _workflow(path: Path) -> dict:
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LauncherError(f"{path}: this is no workflow ({error}).") from error
    if isinstance(workflow, dict) and "nodes" in workflow and "links" in workflow:
        raise LauncherError(f"{path} is in the web page's format. Export it there with Workflow > Export (API).")
    nodes = workflow.values() if isinstance(workflow, dict) else ()
    if not nodes or not all(isinstance(n, dict) and "class_type" in n and isinstance(n.get("inputs"), dict) for n in nodes):
        raise LauncherError(f"{path} is no workflow in API format: each node has a class_type and inputs.")
    return workflow


def _axis(workflow: dict, text: str) -> dict:
    target, equals, values = text.partition("=")
    name, dot, put = target.rpartition(".")
    if not (equals and dot and name and put):
        raise LauncherError(f"--set {text}: write NODE.INPUT=VALUES, such as 3.seed=1,2,3.")
    titled = [key for key, node in workflow.items() if node.get("_meta", {}).get("title") == name]
    found = [name] if name in workflow else titled
    if len(found) != 1:
        known = ", ".join(
            f"{key} ({node.get('_meta', {}).get('title') or node['class_type']})" for key, node in workflow.items()
        )
        problem = f"several nodes have the title {name}; take an id" if found else f"there is no node {name}"
        raise LauncherError(f"--set {text}: {problem}. The nodes are: {known}.")
    inputs = workflow[found[0]]["inputs"]
    if put not in inputs or isinstance(inputs[put], (list, dict)):
        free = ", ".join(key for key, value in inputs.items() if not isinstance(value, (list, dict))) or "none"
        problem = "is connected to another node" if put in inputs else "is no input of that node"
        raise LauncherError(f"--set {text}: {put} {problem}. Inputs to set: {free}.")
    try:
        found_values = [_as(inputs[put], value) for value in _values(values)]
    except (OSError, ValueError) as error:
        raise LauncherError(f"--set {text}: {error}. The workflow has {json.dumps(inputs[put])} there.") from error
    return {"label": target, "node": found[0], "input": put, "values": found_values}


def _values(text: str) -> list:
    """A list `a,b,c` (or in JSON), a range `first:last:count`, or `@file` with a value in each line."""
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    if match := re.fullmatch(rf"({number}):({number}):(\d+)", text):
        first, last, count = float(match[1]), float(match[2]), int(match[3])
        if not count:
            raise ValueError("a range has at least one value")
        steps = [round(first + (last - first) * i / max(count - 1, 1), 12) for i in range(count)]
        return [int(step) if step.is_integer() else step for step in steps]
    if text.startswith("@"):
        values = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    else:
        values = json.loads(text) if text.startswith("[") else text.split(",")
    values = [value for value in values if value != ""]
    if not values:
        raise ValueError("there are no values")
    return values


def _as(present: bool | int | float | str, value) -> bool | int | float | str:
    """A value in the type of the one that is there. A whole number may stand for any: the web page writes 1 for 1.0."""
    if isinstance(present, str):
        return str(value)
    if isinstance(present, bool):
        if str(value).lower() not in ("true", "false"):
            raise ValueError(f"{value} is neither true nor false")
        return str(value).lower() == "true"
    number = float(value)  # raises ValueError that names it
    if not math.isfinite(number):
        raise ValueError(f"{value} is not finite")
    return int(value) if re.fullmatch(r"[-+]?\d+", str(value)) and isinstance(present, int) else number


# --- the output folder -----------------------------------------------------------------------------------------------


def open_folder(out: Path, axes: list[dict], prompts: list[dict]) -> None:
    """Make the folder of a sweep, or see that it is this one's. Raises LauncherError for any other folder."""
    digest = hashlib.sha256("".join(sorted(prompt["id"] for prompt in prompts)).encode()).hexdigest()
    head = {"sweep": digest, "prompts": len(prompts), "axes": [{k: axis[k] for k in ("label", "values")} for axis in axes]}
    try:
        (out / ".incoming").mkdir(parents=True, exist_ok=True)
        (out / "table").mkdir(exist_ok=True)
        if not (out / "sweep.json").exists():
            if others := {entry.name for entry in out.iterdir()} - {".incoming", "table"}:
                raise LauncherError(f"--out {out} has other files in it, such as {min(others)}. Give a new folder.")
            _write(out / "sweep.json", json.dumps(head, indent=1))
    except OSError as error:
        raise LauncherError(f"--out {out}: files cannot be saved there ({error.strerror}).") from error
    if read_head(out)["sweep"] != digest:
        raise LauncherError(
            f"--out {out} is the folder of another sweep: its workflow or its values differ. Give a new folder."
        )


def read_head(out: Path) -> dict:
    try:
        head = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
        return {"sweep": str(head["sweep"]), "prompts": int(head["prompts"]), "axes": list(head["axes"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LauncherError(f"{out} is not the folder of a sweep ({error}).") from error


def _write(path: Path, text: str) -> None:
    """Beside it, then renamed."""
    incoming = path.parent / ".incoming" / uuid.uuid4().hex
    incoming.write_text(text, encoding="utf-8")
    incoming.replace(path)


def read_row(out: Path, key: str) -> dict | None:
    """The row of a prompt that has run, from its folder. Only names of files in that folder are taken."""
    try:
        row = json.loads((out / key / "row.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if row["id"] != key or not all(re.fullmatch(r"[\w-]+(\.\w+)?", name) for name in row["files"]):
        raise LauncherError(f"{out / key / 'row.json'} was not written by a sweep.")
    return row


def read_rows(out: Path, besides: Iterable[str] = ()) -> Iterator[dict]:
    """The rows of all that has run, in the order of their ids, but of `besides`."""
    keys = {entry.name for entry in os.scandir(out) if ID.fullmatch(entry.name)} - set(besides)
    return (row for key in sorted(keys) if (row := read_row(out, key)))


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

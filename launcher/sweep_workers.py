"""The workers of a sweep and their driver, on Ray Data: see `sweep`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path

from .environment import PACK, Environment, LauncherError, variables
from .sweep import duration, read_row, read_rows

RUNS = 2  # of one prompt, before its worker's end is taken for its fault
TOGETHER, TOGETHER_S = 200, 30.0  # rows in a file of the table, and how long the first of them waits
TOLD_S = 10.0
READERS = ("LogDensity", "ExactLogDensity")


class Worker:
    """An actor: a ComfyUI of its machine, which runs one prompt after the other. Ends itself where that one ends."""

    def __init__(self, where: Environment, out: Path, limit_s: float, kinds: set[str]):
        from .client import Client

        self.out, self.limit_s, self.name = out, limit_s, f"{socket.gethostname()}-{os.getpid()}"
        if not (out / "sweep.json").is_file():
            raise LauncherError(f"--out {out} is not there on {socket.gethostname()}: it has to be a folder of all machines.")
        command = [str(where.python), str(PACK / "run.py"), "in-host-python", "serve"]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        env = {name: value for name, value in variables(where).items() if name != "PYTHONPATH"}  # which is for this process
        self.process = subprocess.Popen(command, env=env, text=True, **streams)  # ends when its stdin does
        said = []
        for line in self.process.stdout:
            if line.startswith('{"url"'):
                break
            said.append(line)
        else:
            raise LauncherError(f"ComfyUI did not start on {socket.gethostname()}: {''.join(said)}")
        serving = json.loads(line)
        self.client, self.saved = Client(serving["url"]), Path(serving["output"])
        self.last = set()
        if missing := kinds - set(self.client.object_info()):
            raise LauncherError(f"ComfyUI on {socket.gethostname()} lacks the nodes: {', '.join(sorted(missing))}.")

    def __call__(self, batch: dict) -> dict:
        rows = [self.row(key, json.loads(prompt)) for key, prompt in zip(batch["id"].tolist(), batch["prompt"].tolist())]
        return {"row": [json.dumps(row) for row in rows]}

    def row(self, key: str, prompt: dict) -> dict:
        """Run a prompt, unless it has run; its row, once its folder is in place."""
        from .client import WorkflowError

        if row := read_row(self.out, key):
            return row
        row = {"id": key, "settings": prompt["settings"], "status": "done", "error": "", "seconds": 0.0, "worker": self.name}
        row |= {"files": [], "bits_per_dim": []}
        folder, start = self._claimed(key), time.monotonic()
        try:
            if folder is None:
                raise WorkflowError(f"ComfyUI, or its worker, ended each of the {RUNS} times that this prompt ran.")
            entry = self.client.run(prompt["graph"], timeout=self.limit_s)
            row |= {"files": self._keep(entry, folder), "bits_per_dim": bits_of(entry)}
        except TimeoutError as error:
            row |= {"status": "timeout", "error": str(error)}
        except (WorkflowError, ValueError) as error:
            row |= {"status": "failed", "error": str(error)}
        except ConnectionError:
            os._exit(1)  # Ray starts this worker anew, and repeats its prompt
        row["seconds"] = round(time.monotonic() - start, 3)
        row = put(self.out, row, folder)
        if row["status"] == "timeout":
            os._exit(1)  # what still runs there ends with it; asked again, the prompt has a row
        return row

    def _claimed(self, key: str) -> Path | None:
        """A folder for what the prompt saves; None where all its runs are used up."""
        for run in range(RUNS):
            with contextlib.suppress(FileExistsError):
                folder = self.out / ".incoming" / f"{key}-{run}"
                folder.mkdir()
                return folder
        return None

    def _keep(self, entry: dict, folder: Path) -> list[str]:
        """Copy what was saved. Names are made here, so that they depend neither on what ran before nor on the workflow."""
        root, files = self.saved.resolve(), {}
        for node in sorted(entry["outputs"]):
            items = [item for found in entry["outputs"][node].values() for item in found]
            for item in (item for item in items if isinstance(item, dict) and item.get("type") == "output"):
                path = (root / item.get("subfolder", "") / item["filename"]).resolve()
                if not path.is_relative_to(root):
                    raise ValueError(f"node {node} names a file outside the output folder: {path}")
                name = re.sub(r"[^\w-]", "_", f"{len(files)}-{node}") + re.sub(r"[^.\w]", "_", path.suffix)
                shutil.copyfile(path, folder / name)
                files[name] = path
        for path in self.last - set(files.values()):  # ComfyUI may name again only what it named last time
            path.unlink(missing_ok=True)
        self.last = set(files.values())
        return list(files)


def put(out: Path, row: dict, folder: Path | None) -> dict:
    """Put a row and the folder of its files in place; the row that is there, where another run came first."""
    if folder is None:
        folder = out / ".incoming" / uuid.uuid4().hex
        folder.mkdir()
    (folder / "row.json").write_text(json.dumps(row), encoding="utf-8")
    try:
        folder.rename(out / row["id"])
    except OSError:
        if not (first := read_row(out, row["id"])):
            raise
        shutil.rmtree(folder)
        return first
    return row


def bits_of(entry: dict) -> list[float]:
    """Bits per dimension that a prompt showed: on a Density Contact Sheet, or in a Preview Any behind a Log-Density."""
    graph, bits = entry["prompt"][2], []
    for node in sorted(entry["outputs"]):
        shown, source = entry["outputs"][node], graph[node]["inputs"].get("source")
        for table in shown.get("table", ()) if graph[node]["class_type"] == "DensityContactSheet" else ():
            bits += [float(number) for line in json.loads(table)["rows"] for number in line["bits_per_dim"]]
        if isinstance(source, list) and source[1] == 0 and graph[source[0]]["class_type"] in READERS:
            bits += [float(number) for text in shown.get("text", ()) for number in json.loads(text)]
    return bits


class Table:
    """The Parquet files. Rows are written once there are enough of them."""

    def __init__(self, out: Path):
        from pyarrow import parquet

        self.out, self.rows, self.since = out, [], time.monotonic()
        # Read before Ray is imported: it registers Arrow types that may unpickle what a file says.
        parts = [parquet.read_table(path, columns=["id"], partitioning=None) for path in out.glob("table/*.parquet")]
        self.ids = {key for part in parts for key in part["id"].to_pylist()}

    def add(self, row: dict) -> None:
        self.since = self.since if self.rows else time.monotonic()
        self.rows.append(row | {"settings": json.dumps(row["settings"])})
        if len(self.rows) >= TOGETHER or time.monotonic() - self.since > TOGETHER_S:
            self.flush()

    def flush(self) -> None:
        import pyarrow
        from pyarrow import parquet

        text, number = pyarrow.string(), pyarrow.float64()
        kinds = {"id": text, "settings": text, "status": text, "error": text, "seconds": number, "worker": text}
        kinds |= {"files": pyarrow.list_(text), "bits_per_dim": pyarrow.list_(number)}
        if self.rows:
            name = f"{time.time_ns():020}.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(self.rows, pyarrow.schema(kinds)), self.out / ".incoming" / name)
            (self.out / ".incoming" / name).rename(self.out / "table" / name)
        self.rows = []


def run(
    prompts: list[dict],
    where: Environment,
    out: Path,
    workers: int | None = None,
    address: str | None = None,
    cpus: int = 1,
    limit_s: float = 600.0,
    retry: bool = False,
    worker: type = Worker,
) -> None:
    """Run what has not run. Raises LauncherError where Ray or a ComfyUI does not start."""
    shutil.rmtree(out / ".incoming")
    (out / ".incoming").mkdir()
    if retry:
        shutil.rmtree(out / "table")  # made anew from the folders
        (out / "table").mkdir()
        for row in (row for row in read_rows(out) if row["status"] != "done"):
            shutil.rmtree(out / row["id"])
    table = Table(out)
    for row in read_rows(out, table.ids):  # of a driver that died before it wrote them
        table.add(row)
    table.flush()
    table.ids |= {row["id"] for row in read_rows(out, table.ids)}
    left = [prompt for prompt in prompts if prompt["id"] not in table.ids]
    print(f"{len(prompts)} prompts, of which {len(prompts) - len(left)} have run.", flush=True)
    if left:
        _run(left, where, out, workers, address, cpus, limit_s, worker, table)


def _run(left, where, out, workers, address, cpus, limit_s, worker, table) -> None:
    if not address:  # else Ray listens on every address of this machine
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    settings = {} if address else {"include_dashboard": False, "num_cpus": max((workers or 1) * cpus, os.cpu_count() or 1)}
    # each machine has this pack at the same place, so that a worker finds its code
    settings["runtime_env"] = {"env_vars": {"PYTHONPATH": str(PACK)}}
    ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **settings)
    gpus = ray.cluster_resources().get("GPU", 0)
    workers = workers or int(gpus) or len(ray.nodes())
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised, too
    ray.data.DataContext.get_current().enable_progress_bars = False
    kinds = {node["class_type"] for prompt in left for node in prompt["graph"].values()}
    items = [{"id": prompt["id"], "prompt": json.dumps(prompt)} for prompt in left]
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        worker,
        fn_constructor_args=(where, out, limit_s, kinds),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        num_gpus=1 if gpus else None,
    )
    del items
    count, start, told = 0, None, 0.0
    try:
        for found in results.iter_rows():
            table.add(json.loads(found["row"]))
            count, now = count + 1, time.monotonic()
            start = start or now
            if now - told > TOLD_S or count == len(left):
                rate = (now - start) / (count - 1) if count > 1 else json.loads(found["row"])["seconds"] / workers
                print(f"{count} of {len(left)}; about {duration(rate * (len(left) - count))} left", flush=True)
                told = now
    except ray.exceptions.RayError as error:  # around a worker's own
        raise LauncherError(str(error).rpartition("LauncherError: ")[2]) from error
    finally:
        table.flush()
        ray.shutdown()

"""Sweeps on Ray: 300 prompts of mixed nodes, killed in every way; 10,000 of a stand-in; resuming by Ray's own checkpoint.

    python3 run.py bench sweeps

Writes docs/sweeps.json. Half an hour on two cores; makes .host/sweep the first time.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from ..launcher import sweep
from ..launcher.environment import PACK, environment, prepare_sweep
from ..launcher.host import running_host
from ..launcher.in_process import COMFYUI
from ..testing.mixed_prompts import mixed_run
from .pages import publish, read

PROMPTS, WORKERS = 300, 2
DRY, DRY_S, MEMORY_EVERY = 10_000, 0.005, 1000
RESUMED, RESUMED_S = 400, 0.05
SECONDS = "seconds"
# on 127.0.0.1 alone, and one thread for each worker
ONE_THREAD = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
DRIVER = str(PACK / "testing" / "sweep_driver.py")


def prompts_of(graphs):
    return [{"id": sweep.prompt_id(g), "settings": {"number": i}, "graph": g} for i, g in enumerate(graphs)]


def sleeping(seconds, i):
    """A graph for the stand-in."""
    return {"1": {"class_type": "Sleep", "inputs": {"number": i}, "sleep": seconds}}


def start(prompts, out, **options):
    """A driver."""
    out.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".json")
    file.write_text(json.dumps(prompts))
    asked = {"prompts": str(file), "out": str(out), "workers": WORKERS, "comfyui": str(COMFYUI), "python": sys.executable}
    return subprocess.Popen(
        [str(prepare_sweep()), DRIVER, json.dumps(asked | options)], env=os.environ | ONE_THREAD, stderr=subprocess.DEVNULL
    )


def finish(driver):
    if driver.wait():
        raise RuntimeError(f"the driver ended with exit code {driver.returncode}")


def done(out):
    return sum(bool(sweep.ID.fullmatch(entry.name)) for entry in os.scandir(out))


def until(out, count, driver):
    while done(out) < count:
        if driver.poll() is not None:
            raise RuntimeError("the driver ended too early")
        time.sleep(0.05)


def digests(paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def results_of(out):
    """id -> digests of its files."""
    return {row["id"]: digests(out / row["id"] / name for name in row["files"]) for row in sweep.read_rows(out)}


def table_of(out, name="table"):
    """The ids in the Parquet files, as Ray's Python reads them."""
    code = "import sys, json, pyarrow.parquet as p; ids = [p.read_table(f)['id'].to_pylist() for f in sys.argv[1:]]"
    code += "; print(json.dumps(sum(ids, [])))"
    files = sorted((out / name).glob("*.parquet"))
    return json.loads(subprocess.run([prepare_sweep(), "-c", code, *files], capture_output=True, check=True).stdout)


def lost_runs(out):
    """id -> runs of it that were cut off."""
    return Counter(entry.name[:64] for entry in os.scandir(out / ".incoming") if sweep.ID.fullmatch(entry.name[:64]))


def alone(graphs, folder):
    """(seconds, id -> digests) of one server's own queue."""
    with running_host(environment(), folder) as host:
        host.client.run(mixed_run(PROMPTS))  # warm
        began = time.monotonic()
        entries = host.client.queue_many(graphs)
        took = time.monotonic() - began
        return took, {sweep.prompt_id(g): digests(host.saved_files(e)) for g, e in zip(graphs, entries)}


def throughput(folder):
    """Two workers, and before and after them one server's own queue with half of the prompts."""
    graphs = [mixed_run(i) for i in range(PROMPTS)]
    os.environ.update(ONE_THREAD)
    queue_s, expected = alone(graphs[::2], folder / "before")
    out = folder / "clean"
    driver = start(prompts_of(graphs), out)
    until(out, WORKERS, driver)
    began = time.monotonic()
    finish(driver)
    sweep_s = time.monotonic() - began
    after_s, after = alone(graphs[1::2], folder / "after")
    queue_s, expected = queue_s + after_s, expected | after
    rows = list(sweep.read_rows(out))
    busy = sum(row[SECONDS] for row in rows)
    return expected, {
        "prompts": PROMPTS,
        "queue_s": queue_s,
        "sweep_s": sweep_s,
        "ratio": queue_s / sweep_s,
        "busy": busy / sweep_s / WORKERS,
        "load": os.getloadavg()[0],
        "same_bytes": sum(results_of(out)[key] == expected[key] for key in expected),
    }


@contextlib.contextmanager
def cluster():
    """A function that adds a node; it returns (address, pid of its raylet)."""
    process = subprocess.Popen(
        [str(prepare_sweep()), DRIVER],
        env=os.environ | ONE_THREAD,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )

    def add(cpus):
        print(cpus, file=process.stdin, flush=True)
        return json.loads(next(line for line in process.stdout if line.startswith("[")))

    with process:
        yield add
        process.stdin.close()


def below(pid, words):
    """Processes below one whose command line has these words."""
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if words in " ".join(process.cmdline()):
                yield process


def killed(folder, expected):
    """The same prompts while a ComfyUI, an actor, a node and the driver are killed, and a node joins."""
    out, prompts = folder / "killed", prompts_of(mixed_run(i) for i in range(PROMPTS))
    with cluster() as add:
        address, _ = add(0)
        nodes = [add(1)[1] for _ in range(WORKERS)]
        driver = start(prompts, out, address=address)
        until(out, 40, driver)
        next(below(nodes[0], "main.py --base-directory")).kill()
        until(out, 80, driver)
        next(below(nodes[0], "ray::MapWorker")).kill()
        until(out, 120, driver)
        lost = psutil.Process(nodes[1])
        for process in [lost, *lost.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        until(out, 150, driver)
        joined = add(1)[1]
        until(out, 220, driver)
        workers = {f"-{process.pid}" for process in below(joined, "ray::MapWorker")}
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        before, runs = done(out), lost_runs(out)
        driver = start(prompts, out, address=address)
        finish(driver)
    runs += lost_runs(out)
    runs.update(list(expected))
    rows, table, found = list(sweep.read_rows(out)), table_of(out), results_of(out)
    return {
        "prompts": len(prompts),
        "killed": ["ComfyUI", "actor", "node", "driver"],
        "done_when_driver_died": before,
        "rows": len(rows),
        "rows_done": sum(row["status"] == "done" for row in rows),
        "in_table": len(table),
        "ids_in_table": len(set(table)),
        "same_bytes": sum(found.get(key) == expected[key] for key in expected),
        "cut_off": sum(runs.values()) - len(expected),
        "most_runs": max(runs.values()),
        "by_joined_node": sum(row["worker"].endswith(tuple(workers or {"none"})) for row in rows),
    }


def dry(folder):
    """Many prompts of a stand-in: memory, and what the adapter itself costs."""
    out, used = folder / "dry", []
    prompts = prompts_of(sleeping(DRY_S, i) for i in range(DRY))
    driver = start(prompts, out, worker="memory")
    until(out, 1, driver)
    began = time.monotonic()
    while driver.poll() is None:
        if done(out) >= MEMORY_EVERY * (len(used) + 1):
            with contextlib.suppress(psutil.Error):
                used.append(psutil.Process(driver.pid).memory_info().rss >> 20)
        time.sleep(0.3)
    took = time.monotonic() - began
    finish(driver)
    workers = [[int(line) >> 20 for line in file.open()] for file in out.glob(".incoming/memory-*")]
    cost = took / DRY
    return {
        "prompts": DRY,
        "sleep_ms": DRY_S * 1e3,
        "seconds": took,
        "driver_mib": used,
        "worker_mib": [[mib[len(mib) // 10], mib[-1]] for mib in workers],
        "ms_of_driver": cost * 1e3,
        "ms_of_worker": (cost * WORKERS - DRY_S) * 1e3,
        "in_table": len(table_of(out)),
    }


def resumed(folder):
    """The driver is killed half-way: how many prompts had run, and how many of them need not run again."""
    prompts = prompts_of(sleeping(RESUMED_S, i) for i in range(RESUMED))
    out = folder / "ours"
    driver = start(prompts, out, worker="stand_in")
    until(out, RESUMED // 2, driver)
    driver.kill()
    driver.wait()
    time.sleep(2)
    kept = done(out)
    ours = {"had_run": kept + sum(lost_runs(out).values()), "kept": kept}
    out = folder / "ray"
    (out / "checkpoint").mkdir(parents=True)
    (out / "runs").touch()
    runs = lambda: len((out / "runs").read_text().split())
    driver = start(prompts, out, checkpoint=True)
    while runs() < RESUMED // 2 and driver.poll() is None:
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    time.sleep(2)
    return {"folders": ours, "checkpoint": {"had_run": runs(), "kept": len(table_of(out, "checkpoint"))}}


def main():
    results = read("sweeps") or {}
    with tempfile.TemporaryDirectory(dir=PACK / ".host") as name:
        folder = Path(name)
        expected, results["throughput"] = throughput(folder)
        results["killed"] = killed(folder, expected)
        results["dry"] = dry(folder)
        results["resumed"] = resumed(folder)
    publish("sweeps", results)

"""Sweeps: what is asked for, the output folder, a worker on the real host; and one short sweep on Ray, where Ray is."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from density_guidance.launcher import sweep, sweep_workers
from density_guidance.launcher.environment import PACK, LauncherError
from density_guidance.testing.prompts import api_workflow, made_small, small_run

KSAMPLER = PACK / "workflows" / "api" / "ksampler.json"


def plan(*sets, zipped=False, workflow=KSAMPLER):
    return sweep.plan(workflow, list(sets), zipped)


# ------------------------------------------------------------ what is asked for


@pytest.mark.parametrize(
    "text, values",
    [
        ("4.seed=1,2,3", [1, 2, 3]),
        ("4.seed=0:3:4", [0, 1, 2, 3]),
        ("4.seed=7:9:1", [7]),
        ("2.quantile=0.1:0.3:3", [0.1, 0.2, 0.3]),
        ("Density Guidance (model).quantile=0.5,1e-1", [0.5, 0.1]),
        ("4.cfg=1,2.5", [1, 2.5]),
        ("4.sampler_name=euler,heun", ["euler", "heun"]),
        ('6.filename_prefix=["a, b", "c"]', ["a, b", "c"]),
        ("1.size=32,64", ["32", "64"]),
        ("3.match_quantile=true,False", [True, False]),
    ],
)
def test_values_take_the_type_of_what_is_there(text, values):
    (axis,), prompts = plan(text)
    assert axis["values"] == values and list(map(type, axis["values"])) == list(map(type, values))
    assert [prompt["graph"][axis["node"]]["inputs"][axis["input"]] for prompt in prompts] == values


def test_a_file_has_a_value_in_each_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("one, with a comma\n\ntwo=2\n")
    assert plan(f"6.filename_prefix=@{tmp_path / 'prompts.txt'}")[0][0]["values"] == ["one, with a comma", "two=2"]


def test_settings_are_multiplied_or_paired_and_ids_are_of_the_whole_graph():
    _, product = plan("4.seed=1,2,3", "4.steps=5,6")
    _, pairs = plan("4.seed=1,2", "4.steps=5,6", zipped=True)
    assert [tuple(p["settings"].values()) for p in product] == [(s, n) for s in (1, 2, 3) for n in (5, 6)]
    assert [p["settings"] for p in pairs] == [{"4.seed": 1, "4.steps": 5}, {"4.seed": 2, "4.steps": 6}]
    assert {p["id"] for p in pairs} <= {p["id"] for p in product} and len({p["id"] for p in product}) == 6
    assert all(re.fullmatch("[0-9a-f]{64}", p["id"]) for p in product)
    shuffled = dict(reversed(product[0]["graph"].items()))
    assert sweep.prompt_id(shuffled) == product[0]["id"]
    assert len(plan("4.seed=1,1,2")[1]) == 2  # one graph runs once


@pytest.mark.parametrize(
    "sets, message",
    [
        (["4.seed"], "write NODE.INPUT=VALUES"),
        (["seed=1"], "write NODE.INPUT=VALUES"),
        (["99.seed=1"], r"there is no node 99. The nodes are: 1 \(Load Exact Density Model\), 2"),
        (["4.sed=1"], "sed is no input of that node. Inputs to set: .*seed"),
        (["4.model=1"], "model is connected to another node"),
        (["4.seed=one"], "'one'. The workflow has"),
        (["4.cfg=nan"], "nan is not finite"),
        (["4.seed="], "there are no values"),
        (["4.seed=1:2:0"], "at least one value"),
        (["3.match_quantile=maybe"], "neither true nor false"),
        (["6.filename_prefix=@/no/such/file"], "No such file"),
        (["4.seed=1", "KSampler.seed=2"], "set twice"),
    ],
)
def test_a_bad_setting_is_told_before_anything_starts(sets, message):
    with pytest.raises(LauncherError, match=message):
        plan(*sets)


def test_pairs_need_equally_many_values():
    with pytest.raises(LauncherError, match="2, 3 of them"):
        plan("4.seed=1,2", "4.steps=1,2,3", zipped=True)


def test_a_title_of_two_nodes_is_refused(tmp_path):
    path = tmp_path / "two.json"
    path.write_text(json.dumps({key: {"class_type": "A", "inputs": {"x": 1}, "_meta": {"title": "T"}} for key in "12"}))
    with pytest.raises(LauncherError, match="several nodes have the title T; take an id"):
        plan("T.x=1", workflow=path)


@pytest.mark.parametrize(
    "text, message", [('{"nodes": [], "links": []}', r"Export \(API\)"), ("[1]", "API format"), ("{", "no workflow")]
)
def test_what_is_no_workflow_in_api_format_is_refused(tmp_path, text, message):
    (tmp_path / "workflow.json").write_text(text)
    with pytest.raises(LauncherError, match=message):
        plan("1.x=1", workflow=tmp_path / "workflow.json")
    with pytest.raises(LauncherError, match=r"Export \(API\)"):
        plan("4.seed=1", workflow=PACK / "workflows" / "ksampler.json")


def run_py(*arguments):
    return subprocess.run([sys.executable, PACK / "run.py", "sweep", *map(str, arguments)], capture_output=True, text=True)


def test_the_command_says_what_is_wrong_and_prepares_nothing(tmp_path):
    (tmp_path / "mine.txt").touch()
    for arguments, code, message in [
        ([], 2, "a sweep needs WORKFLOW.json, --set and --out"),
        ([KSAMPLER, "--set", "4.seed=1", "--out", tmp_path / "a", "--workers", 0], 2, "above 0"),
        ([KSAMPLER, "--set", "9.seed=1", "--out", tmp_path / "a"], 1, "run.py: --set 9.seed=1: there is no node 9."),
        ([KSAMPLER, "--set", "4.seed=1", "--out", tmp_path], 1, "has other files in it, such as mine.txt"),
        (["--report", tmp_path], 1, "is not the folder of a sweep"),
    ]:
        result = run_py(*arguments)
        assert (
            (result.returncode, result.stdout) == (code, "") and message in result.stderr and "Traceback" not in result.stderr
        )
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------ the output folder


def test_a_folder_belongs_to_one_sweep(tmp_path):
    axes, prompts = plan("4.seed=1,2")
    for _ in range(2):
        sweep.open_folder(tmp_path / "out", axes, prompts)
    assert sweep.read_head(tmp_path / "out")["prompts"] == 2
    with pytest.raises(LauncherError, match="of another sweep"):
        sweep.open_folder(tmp_path / "out", *plan("4.seed=1,3"))


@pytest.fixture
def out(tmp_path):
    sweep.open_folder(tmp_path / "out", *plan("4.seed=1,2"))
    return tmp_path / "out"


def row_of(key, **changes):
    row = {"id": key, "settings": {"4.seed": 1}, "status": "done", "error": "", "seconds": 1.0, "worker": "w"}
    return row | {"files": ["0-6.png"], "bits_per_dim": [1.5]} | changes


def finished(out, key, **changes):
    folder = out / ".incoming" / f"{key}-0"
    folder.mkdir()
    return sweep_workers.put(out, row_of(key, **changes), folder)


def test_of_two_runs_of_a_prompt_the_first_stays(out):
    first = finished(out, "a" * 64)
    assert finished(out, "a" * 64, worker="another") == first == sweep.read_row(out, "a" * 64)
    assert list(sweep.read_rows(out)) == [first] and not list((out / ".incoming").iterdir())


def test_what_is_half_made_is_no_row(out):
    (out / ".incoming" / ("a" * 64 + "-0")).mkdir()
    (out / "notes").mkdir()
    assert list(sweep.read_rows(out)) == [] and sweep.read_row(out, "a" * 64) is None


@pytest.mark.parametrize("name", ["../sweep.json", "/etc/passwd", "a/b.png", "..", "a\\b.png", ""])
def test_names_in_a_row_cannot_leave_its_folder(out, name):
    finished(out, "a" * 64, files=[name])
    with pytest.raises(LauncherError, match="was not written by a sweep"):
        list(sweep.read_rows(out))


def test_no_pickle_is_read():
    """Neither by the launcher itself, nor by Arrow types of Ray's, which are there only after the table has been read."""
    text = "".join((PACK / "launcher" / f"{name}.py").read_text() for name in ("sweep", "sweep_workers", "sweep_report"))
    assert not re.search(r"import pickle|pickle\.load|numpy\.load|torch\.load", text)
    assert text.index("table = Table(out)") < text.index("    import ray\n")


# ------------------------------------------------------------ a worker on the real host


@pytest.fixture
def worker(server, out):
    """A worker whose ComfyUI is the tests' own."""
    made = object.__new__(sweep_workers.Worker)
    made.__dict__ |= {"out": out, "limit_s": 60.0, "name": "w", "client": server.client, "saved": server.output, "last": set()}
    return made


def one(graph):
    return sweep.prompt_id(graph), {"settings": {"seed": 1}, "graph": graph}


def test_a_worker_stores_what_a_prompt_saved_and_runs_it_once(worker, server, out, monkeypatch):
    graph = small_run(0.3, "stored")
    row = worker.row(*one(graph))
    files = [out / row["id"] / name for name in row["files"]]
    alone = server.saved_files(server.client.run(small_run(0.3, "stored")))
    assert row["status"] == "done" and row["worker"] == "w" and row["seconds"] > 0
    assert [file.suffix for file in files] == [".png", ".png", ".latent"]
    assert sorted(path.suffix for path in alone) == sorted(file.suffix for file in files)
    monkeypatch.setattr(worker, "client", None)
    assert worker.row(*one(graph)) == row


def test_outputs_that_comfyui_did_not_run_again_are_stored_too(worker, out):
    """It names the files of last time for a node that it need not run."""
    color = {"width": 8, "height": 8, "batch_size": 1, "color": 0}
    for swept in (1, 2, 3):
        graph = {
            "still": {"class_type": "EmptyImage", "inputs": color},
            "moving": {"class_type": "EmptyImage", "inputs": color | {"color": swept}},
            "a": {"class_type": "SaveImage", "inputs": {"images": ["still", 0], "filename_prefix": "both"}},
            "b": {"class_type": "SaveImage", "inputs": {"images": ["moving", 0], "filename_prefix": "both"}},
        }
        row = worker.row(*one(graph))
        still, moving = ((out / row["id"] / name).read_bytes() for name in ("0-a.png", "1-b.png"))
        assert row["files"] == ["0-a.png", "1-b.png"] and still != moving
        assert f'"color": {swept}'.encode() in moving
    assert len(worker.last) == 2  # and no more of them are kept


def test_bits_that_the_graph_reads_are_in_the_row(worker):
    row = worker.row(*one(made_small(api_workflow("detail_sweep"), steps=3)))
    assert len(row["bits_per_dim"]) == 4 and all(isinstance(number, float) for number in row["bits_per_dim"])


def test_a_prompt_that_comfyui_refuses_is_a_row_with_its_error(worker):
    graph = small_run(0.3, "refused")
    graph["latent"]["class_type"] = "NoSuchNode"
    row = worker.row(*one(graph))
    assert row["status"] == "failed" and "NoSuchNode" in row["error"] and row["files"] == []
    assert worker.row(*one(small_run(0.31, "after")))["status"] == "done"


def test_a_file_outside_the_output_folder_is_refused(worker, out):
    entry = {"outputs": {"9": {"images": [{"filename": "../../secret.png", "subfolder": "..", "type": "output"}]}}}
    with pytest.raises(ValueError, match="node 9 names a file outside the output folder"):
        worker._keep(entry, out / ".incoming")


class Ended(Exception):
    pass


@pytest.fixture
def ends(monkeypatch):
    def end(code):
        raise Ended(code)

    monkeypatch.setattr(sweep_workers.os, "_exit", end)


def test_a_prompt_over_its_time_is_a_row_and_ends_the_worker(worker, ends, out, server):
    worker.limit_s = 0.01
    key, prompt = one(small_run(0.32, "slow"))
    with pytest.raises(Ended):
        worker.row(key, prompt)
    assert sweep.read_row(out, key)["status"] == "timeout" == worker.row(key, prompt)["status"]
    server.client.interrupt()


def test_a_prompt_whose_workers_end_runs_twice_and_is_a_row_then(worker, ends, out):
    key, prompt = one(small_run(0.33, "deadly"))

    class Gone:
        runs = 0

        def run(self, graph, timeout):
            self.runs += 1
            raise ConnectionError

    worker.client = Gone()
    for _ in range(sweep_workers.RUNS):
        with pytest.raises(Ended):
            worker.row(key, prompt)
    row = worker.row(key, prompt)
    assert row["status"] == "failed" and "ended each of the 2 times" in row["error"] and worker.client.runs == 2


# ------------------------------------------------------------ on Ray, where it is: `python3 run.py sweep` installs it

PYTHONS = [PACK / ".host" / "sweep" / "venv" / "bin" / "python", Path(sys.executable)]
RAY = [
    p for p in PYTHONS if p.is_file() and not subprocess.run([p, "-c", "import ray, pyarrow"], capture_output=True).returncode
]
needs_ray = pytest.mark.skipif(not RAY, reason="Ray is not installed: python3 run.py sweep does that")
PICKLED = """
import sys, pickle, pyarrow, os
from pyarrow import parquet
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray
class Evil:
    def __reduce__(self):
        return open, (sys.argv[2], "w")
ids = ArrowPythonObjectArray.from_objects([Evil()])
parquet.write_table(pyarrow.table({"id": ids}), sys.argv[1])
"""


def driver(out, count, **options):
    out.with_suffix(".json").write_text(
        json.dumps(
            [
                {"id": f"{i:064x}", "settings": {"number": i}, "graph": {"1": {"class_type": "A", "sleep": 0.2}}}
                for i in range(count)
            ]
        )
    )
    asked = {
        "prompts": str(out.with_suffix(".json")),
        "out": str(out),
        "workers": 2,
        "worker": "stand_in",
        "comfyui": "",
        "python": "",
    }
    command = [RAY[0], PACK / "testing" / "sweep_driver.py", json.dumps(asked | options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def listeners(process):
    found = [process, *process.children(recursive=True)]
    return {c.laddr.ip.removeprefix("::ffff:") for p in found for c in p.net_connections("inet") if c.status == "LISTEN"}


@needs_ray
@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_a_sweep_goes_on_after_its_worker_and_its_driver_were_killed(tmp_path):
    out, count = tmp_path / "out", 40

    def until(done):
        give_up = time.monotonic() + 120
        while len(list(sweep.read_rows(out)) if out.exists() else []) < done:
            assert time.monotonic() < give_up and running.poll() is None
            time.sleep(0.05)

    with driver(out, count) as running:
        until(5)
        process = psutil.Process(running.pid)
        assert listeners(process) == {"127.0.0.1"}
        next(p for p in process.children(recursive=True) if "ray::MapWorker" in " ".join(p.cmdline())).kill()
        until(20)
        running.kill()
    before = {row["id"] for row in sweep.read_rows(out)}
    with driver(out, count) as running:
        said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said
    assert f"{count} prompts, of which {len(before)} have run" in said and 20 <= len(before) < count
    rows = list(sweep.read_rows(out))
    assert [row["id"] for row in rows] == [f"{i:064x}" for i in range(count)] and {row["status"] for row in rows} == {"done"}
    assert all((out / row["id"] / "0-it.txt").read_text() == row["worker"] for row in rows)
    code = "import sys, pyarrow.parquet as p; print(*sorted(p.read_table(sys.argv[1])['id'].to_pylist()), sep='\\n')"
    table = subprocess.run([RAY[0], "-c", code, out / "table"], capture_output=True, text=True, check=True).stdout.split()
    assert table == [row["id"] for row in rows]


@needs_ray
def test_a_pickle_in_the_table_is_not_read(tmp_path):
    out = tmp_path / "out"
    (out / "table").mkdir(parents=True)
    made = subprocess.run(
        [RAY[0], "-c", PICKLED, out / "table" / "0.parquet", tmp_path / "read"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (tmp_path / "read").unlink(missing_ok=True)
    with driver(out, 0) as running:
        running.communicate(timeout=120)
    assert not (tmp_path / "read").exists()

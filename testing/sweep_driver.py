"""A sweep of given prompts, in Ray's Python, for tests and benchmarks: `sweep_driver.py {"prompts": FILE, "out": DIR, ...}`.

Or, without prompts, a Ray cluster of several nodes on this machine: each line of stdin adds one with that many CPUs, and each
answer is [address, pid of its raylet]. Everything ends with stdin.
"""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.environment import Environment
from launcher.sweep_workers import Worker, run


class StandIn(Worker):
    """Takes `sleep` seconds for each prompt, and saves its settings as a file."""

    def __init__(self, where, out, limit_s, kinds):
        self.out, self.limit_s, self.name, self.client = out, limit_s, str(os.getpid()), self

    def run(self, graph, timeout):
        time.sleep(graph["1"]["sleep"])
        return {"prompt": (0, "", {}), "outputs": {}}

    def _keep(self, entry, folder):
        (folder / "0-it.txt").write_text(self.name)
        return ["0-it.txt"]


class WithMemory(StandIn):
    def __call__(self, batch):
        found = super().__call__(batch)
        import psutil

        with (self.out / ".incoming" / f"memory-{self.name}").open("a") as file:
            print(psutil.Process().memory_info().rss, file=file)
        return found


def checkpointed(prompts, out, workers):
    """The same work with Ray Data's own checkpoint: rows written by write_parquet, ids by CheckpointConfig."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    class Logged:
        def __call__(self, batch):
            for key in batch["id"].tolist():
                with (out / "runs").open("a") as file:
                    file.write(f"{key}\n")
                time.sleep(json.loads(batch["prompt"][0])["graph"]["1"]["sleep"])
            return batch

    ray.init(
        "local", log_to_driver=False, logging_level="ERROR", include_dashboard=False, num_cpus=8
    )  # also for its reads and writes
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(out / "checkpoint"), delete_checkpoint_on_success=False
    )
    if not (out / "prompts").is_dir():  # it takes only what is read from files
        import pyarrow
        from pyarrow import parquet

        (out / "prompts").mkdir(parents=True)
        for prompt in prompts:
            table = pyarrow.table({"id": [prompt["id"]], "prompt": [json.dumps(prompt)]})
            parquet.write_table(table, out / "prompts" / f"{prompt['id']}.parquet")
    found = ray.data.read_parquet(str(out / "prompts"), override_num_blocks=len(prompts))
    pool = ray.data.ActorPoolStrategy(size=workers)
    found.map_batches(Logged, batch_size=1, compute=pool, num_cpus=0.5).write_parquet(str(out / "table"))


def cluster():
    from ray.cluster_utils import Cluster

    nodes = Cluster()
    for line in sys.stdin:
        node = nodes.add_node(num_cpus=int(line), node_ip_address="127.0.0.1", include_dashboard=False)
        processes = node.all_processes["raylet"]
        print(json.dumps([nodes.address, processes[0].process.pid]), flush=True)
    nodes.shutdown()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        cluster()
        sys.exit()
    asked = json.loads(sys.argv[1])
    prompts, out = json.loads(Path(asked["prompts"]).read_text()), Path(asked["out"])
    if asked.get("checkpoint"):
        checkpointed(prompts, out, asked["workers"])
    else:
        kind = {"memory": WithMemory, "stand_in": StandIn}.get(asked.get("worker"), Worker)
        (out / ".incoming").mkdir(parents=True, exist_ok=True)
        (out / "table").mkdir(exist_ok=True)
        (out / "sweep.json").touch()
        where = Environment(Path(asked["comfyui"]), Path(asked["python"]))
        run(prompts, where, out, asked["workers"], asked.get("address"), worker=kind)

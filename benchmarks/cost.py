"""Time of a sampling step beside the model: guided Euler, Detail Daemon and Epsilon Scaling against plain Euler.

    DETAIL_DAEMON=PATH python3 run.py bench cost

DETAIL_DAEMON names a folder with the pack ComfyUI-Detail-Daemon; without it that column is left out. The network costs
nothing, so the ratios are the worst case. Writes docs/cost.json. About five minutes on one core.
"""

import ctypes
import importlib
import importlib.util
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from comfy_extras.nodes_eps import EpsilonScaling

from ..testing import host_runs as h
from .pages import publish

LATENTS = {"4 x 128 x 128": ("EPS", (4, 128, 128)), "16 x 128 x 128": ("FLOW", (16, 128, 128))}
BATCHES, STEPS, REPEATS = (1, 4), 20, 60
PLAIN, AGAIN, GUIDED, DAEMON, SCALING = "plain Euler", "plain Euler again", "guided Euler", "Detail Daemon", "Epsilon Scaling"
VARIABLE, MODULE, NODE = "DETAIL_DAEMON", "detail_daemon_node", "DetailDaemonSamplerNode"


def detail_daemon(folder):
    """Its node's class, from the folder of the pack."""
    folder = Path(folder).resolve()
    if not (folder / f"{MODULE}.py").is_file():
        raise FileNotFoundError(f"{VARIABLE} is {folder}, which has no {MODULE}.py: name the folder of ComfyUI-Detail-Daemon")
    spec = importlib.util.spec_from_file_location(
        "detail_daemon", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["detail_daemon"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return getattr(importlib.import_module(f"detail_daemon.{MODULE}"), NODE)


def ways(model, daemon=None):
    """{name: (model, sampler)}; daemon: the node's class of Detail Daemon."""
    euler = h.core_sampler("euler")
    found = {PLAIN: (model, euler), AGAIN: (model, euler), GUIDED: (model, h.guided_sampler(0.3, 0.1, sampler="euler"))}
    if daemon:
        found[DAEMON] = (
            model,
            daemon().go(
                euler,
                detail_amount=0.1,
                start=0.2,
                end=0.8,
                bias=0.5,
                exponent=1.0,
                start_offset=0.0,
                end_offset=0.0,
                fade=0.0,
                smooth=True,
                cfg_scale_override=0.0,
            )[0],
        )
    found[SCALING] = h.kept(h.outputs(EpsilonScaling, model, 1.005)[0]), euler
    return found


def ratios(model_type, shape, repeats=REPEATS, steps=STEPS, daemon=None):
    """{name: median and quartiles of its time over that of plain Euler in the same repeat}, in the time of this thread."""
    model = h.free_model(model_type)
    noise, sigmas = torch.randn(shape, generator=torch.Generator().manual_seed(1)), h.schedule(model, steps)
    runs, order = ways(model, daemon), random.Random(0)
    seconds = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # the first warms up
        for name in order.sample(list(runs), len(runs)):
            start = time.thread_time()
            h.free_run(*runs[name], sigmas, noise)
            if repeat:
                seconds[name].append(time.thread_time() - start)
    found = {}
    for name in (n for n in runs if n != PLAIN):
        low, middle, high = statistics.quantiles(
            [a / b for a, b in zip(seconds[name], seconds[PLAIN])], n=4, method="inclusive"
        )
        found[name] = {"median": middle, "low": low, "high": high}
    return found


def keep_freed_memory():
    """Freed memory stays with the process: whether glibc returns it, and faults it in anew, depends on what ran before."""
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(trim_threshold, 2**30), libc.mallopt(mmap_threshold, 2**25)


def main():
    torch.set_num_threads(1)
    keep_freed_memory()
    daemon = detail_daemon(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None
    if daemon is None:
        print(f"{VARIABLE} is not set: Detail Daemon is left out. Set it to the folder of ComfyUI-Detail-Daemon.")
    results = {"steps": STEPS, "repeats": REPEATS, "runs": {}}
    for name, (model_type, shape) in LATENTS.items():
        for batch in BATCHES:
            times = ratios(model_type, (batch, *shape), daemon=daemon)
            results["runs"][f"{batch} of {name}"] = {"model": model_type, "times": times}
            print(batch, name, model_type, {way: f"{t['median']:.3f}" for way, t in times.items()}, flush=True)
    publish("cost", results)

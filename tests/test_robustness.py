"""What users do to a pack: any combination, many prompts, a killed server, other packs."""

import contextlib
import os
import signal
import sys
import threading

import comfy.samplers
import psutil
import torch
from density_guidance.benchmarks import long_queue, robustness
from density_guidance.launcher.client import WorkflowError
from density_guidance.launcher.host import running_host
from density_guidance.testing import host_runs as h
from density_guidance.testing import steering
from density_guidance.testing.prompts import results_of, small_run

EXAMPLES = 60


def test_random_runs():
    """A clear error before any model call, or a finite image; the host stays as it was."""
    seen = robustness.explore(EXAMPLES, 0)
    assert sum(seen.values()) >= EXAMPLES * 0.98
    assert seen["finite"] > EXAMPLES / 2 and seen["refused with a reason"] > 0, seen


# --- other packs -------------------------------------------------------------------------------------------------


def test_nothing_of_the_host_is_replaced():
    """No module or class of the host holds a function or class of the pack."""
    host = [
        m
        for name, m in list(sys.modules.items())
        if name.split(".")[0] in ("comfy", "comfy_extras", "comfy_execution", "nodes", "execution", "latent_preview")
    ]
    assert len(host) > 50
    places = [(m.__name__, vars(m)) for m in host]
    places += [(c.__qualname__, vars(c)) for m in host for c in vars(m).values() if isinstance(c, type)]
    for where, names in places:
        for name, value in names.items():
            assert not str(getattr(value, "__module__", "")).startswith("density_guidance"), f"{where}.{name}"


def test_beside_a_pack_that_patches_the_samplers(monkeypatch):
    """Another pack has replaced the host's functions and added a sampler: guidance acts the same, through them."""
    calls = []

    def replaced(original):
        def function(*args, **kwargs):
            calls.append(original.__name__)
            return original(*args, **kwargs)

        return function

    for owner, name in (
        (comfy.samplers, "sampling_function"),
        (comfy.samplers, "calc_cond_batch"),
        (comfy.samplers, "cfg_function"),
        (comfy.samplers.KSAMPLER, "sample"),
        (comfy.samplers.CFGGuider, "predict_noise"),
    ):
        monkeypatch.setattr(owner, name, replaced(getattr(owner, name)))
    monkeypatch.setattr(comfy.samplers, "SAMPLER_NAMES", [*comfy.samplers.SAMPLER_NAMES, "another_packs"])
    model, seen = h.recording(h.exact_model("flow"))
    sigmas = h.schedule(model, 6)
    h.sampled(model, h.guided_sampler(0.2, sampler="euler"), sigmas)
    assert steering.deviation(model, seen, sigmas.tolist(), 0.2)[0] < 1e-4
    assert {"sampling_function", "cfg_function", "sample", "predict_noise"} <= set(calls)


# --- a server, for long ------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_prompts(server):
    """Mixed nodes, each run with another setting, so that nothing is taken from the cache."""
    used = long_queue.memory_after_each(server, 30)
    assert used[-1] < 1.05 * used[9], [v >> 20 for v in used]


def test_killed_in_mid_run_and_started_again(host_environment, server, tmp_path):
    """The prompt queued again after a kill -9 gives the latent that an undisturbed server gives."""
    expected, _ = results_of(server, server.client.run(small_run(0.23, "undisturbed", steps=6)))
    under_way = threading.Event()
    with running_host(host_environment, tmp_path / "first") as host:
        process = psutil.Process(host.pid)

        def queue():
            with contextlib.suppress(WorkflowError, OSError):
                host.client.run(
                    small_run(0.23, "killed", steps=1000, batch_size=8), lambda progress: progress.step > 1 and under_way.set()
                )

        worker = threading.Thread(target=queue, daemon=True)
        worker.start()
        assert under_way.wait(60)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        worker.join(90)
    with running_host(host_environment, tmp_path / "second") as host:
        again, _ = results_of(host, host.client.run(small_run(0.23, "again", steps=6)))
    assert torch.equal(again, expected)

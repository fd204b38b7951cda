"""Makes the real host and the pack importable in the tests' own process, and offers a running server.

Tests say `from density_guidance.dg_core import ...` for the pack, `import comfy...` for the host, and take the fixture
`server` for a real ComfyUI over HTTP. Run them with `python3 run.py test`.
"""

import contextlib
import gc
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from launcher import in_process
from launcher.environment import PACK
from launcher.in_process import COMFYUI

del sys.path[0]  # the pack's folder `nodes` would hide the host's module `nodes`


def pytest_configure(config):
    if not (COMFYUI / "main.py").is_file():
        run_py = PACK / "run.py"
        pytest.exit(f"There is no ComfyUI in {COMFYUI}. Run the tests with: python3 {run_py} test", returncode=4)
    if (
        config.getoption("dist", "no") == "no" or config.option.collectonly
    ):  # otherwise this process only hands out the tests to others
        in_process.import_host()
        in_process.import_pack()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests of the server go to one process, so that one is started, not one for each process."""
    for item in items:
        if "server" in item.fixturenames and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("server"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Where what tests print or a debugger is to be seen, they run in this process; else in as many as there are cores."""
    return 0 if config.option.capture == "no" or config.option.trace else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Other tests go to the processes by files, as they share what is costly within a file."""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class ByGroupOrFile(LoadGroupScheduling):
        def _split_scope(self, nodeid):
            return super()._split_scope(nodeid).split("::")[0]

    return ByGroupOrFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def _host_folders(tmp_path_factory):
    """What host code in this process writes goes to temporary folders."""
    import folder_paths

    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("in-process-output")))
    folder_paths.set_temp_directory(str(tmp_path_factory.mktemp("in-process-temp")))
    folder_paths.set_input_directory(str(tmp_path_factory.mktemp("in-process-input")))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors this small gain nothing from threads, and lose much when something else runs on the other cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _small_heap():
    """The host collects garbage whenever it loads a model; what earlier tests left need not be looked through again."""
    gc.freeze()


@pytest.fixture
def without_plots(request):
    """Nodes draw no plots, which take most of a second each; in a test with "plot" in its name they do."""
    from density_guidance.testing import host_runs

    with contextlib.nullcontext() if "plot" in request.node.name else host_runs.without_plots():
        yield


@pytest.fixture(scope="session")
def host_environment():
    """The ComfyUI and the Python that `running_host` takes."""
    from density_guidance.launcher.environment import Environment

    return Environment(COMFYUI, Path(sys.executable))


@pytest.fixture(scope="session")
def server(host_environment, tmp_path_factory):
    """A real ComfyUI with the pack, started for the first test that asks: a `launcher.host.Host`, with its client."""
    from density_guidance.launcher.host import running_host

    with running_host(host_environment, tmp_path_factory.mktemp("output")) as host:
        yield host

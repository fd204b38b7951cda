"""Makes the real host and the pack importable in the tests' own process, and offers a running server.

Tests say `from density_guidance.dg_core import ...` for the pack, `import comfy...` for the host, and take the fixture
`server` for a real ComfyUI over HTTP. Run them with `python3 run.py test`.
"""

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parent.parent
COMFYUI = PACK / ".host" / "ComfyUI"


def pytest_configure():
    if not (COMFYUI / "main.py").is_file():
        pytest.exit(
            f"There is no ComfyUI in {COMFYUI}. Run the tests with: python3 {PACK / 'run.py'} test", returncode=4
        )
    _import_host()
    _import_pack()


def _import_host():
    # With the pack's root on the path its folder `nodes` would hide the host's module `nodes`.
    sys.path[:] = [str(COMFYUI), *(entry for entry in sys.path if Path(entry or ".").resolve() != PACK)]
    import torch
    from comfy.cli_args import args  # does not look at sys.argv unless the host's main.py asks it to

    args.cpu = (
        not torch.accelerator.is_available()
    )  # before comfy.model_management, which fails without a GPU otherwise


def _import_pack():
    """Load the pack by path, as the host does, under a name that tests can import from."""
    spec = importlib.util.spec_from_file_location(
        "density_guidance", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@pytest.fixture(scope="session", autouse=True)
def _host_folders(tmp_path_factory):
    """What host code in this process writes goes to temporary folders."""
    import folder_paths

    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("in-process-output")))
    folder_paths.set_temp_directory(str(tmp_path_factory.mktemp("in-process-temp")))
    folder_paths.set_input_directory(str(tmp_path_factory.mktemp("in-process-input")))


@pytest.fixture(scope="session")
def host_nodes():
    """The host's module `nodes` in this process, its NODE_CLASS_MAPPINGS filled with all of core's nodes."""
    import nodes

    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    return nodes


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

"""The command line of run.py.

Each command first makes sure of a ComfyUI with any Python, then goes on with the Python of that ComfyUI.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from . import environment, existing
from .environment import PACK, Environment
from .errors import LauncherError

TESTS = PACK / "tests"
BENCHMARKS = PACK / "benchmarks"


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    options, pytest_arguments = _parse(arguments)
    _end_in_good_order_on_signals()
    try:
        return options.run(options, pytest_arguments)
    except LauncherError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 128 + signal.SIGINT


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="run.py", description="The pack's demo and tests, in a real ComfyUI.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="make a contact sheet of density levels", description=_demo.__doc__)
    demo.add_argument(
        "--comfyui", type=Path, metavar="PATH", help="use this ComfyUI (default: one is prepared in .host/)"
    )
    demo.add_argument(
        "--python", type=Path, metavar="PATH", help="the Python that starts that ComfyUI (default: it is looked for)"
    )
    demo.add_argument(
        "--output", type=Path, metavar="DIR", default=PACK / "output", help="where the pictures go (default: output/)"
    )
    demo.set_defaults(run=_demo)

    commands.add_parser("test", help="run the tests; what follows goes to pytest")  # handled below

    bench = commands.add_parser("bench", help="run a benchmark of benchmarks/", description=_bench.__doc__)
    bench.add_argument("name", help="its file's name, without .py")
    bench.set_defaults(run=_bench)

    inner = commands.add_parser("bench-in-host-python")
    inner.add_argument("name")
    inner.set_defaults(run=_bench_in_host_python)

    inner = commands.add_parser("demo-in-host-python")  # what _demo goes on with; no help, so not listed
    inner.add_argument("comfyui", type=Path)
    inner.add_argument("output", type=Path)
    inner.add_argument("--guest", action="store_true")
    inner.set_defaults(run=_demo_in_host_python)

    if arguments[:1] == ["test"]:  # argparse would take pytest's own arguments apart
        return argparse.Namespace(run=_test), arguments[1:]
    options = parser.parse_args(arguments)
    if options.run is _demo and options.python and not options.comfyui:
        parser.error("--python goes with --comfyui: it is the Python that starts that ComfyUI")
    return options, []


def _demo(options: argparse.Namespace, _: list[str]) -> int:
    """Start a ComfyUI, make 4 seeds by 5 density levels, and stop it again. Nothing is written into a ComfyUI given."""
    if options.comfyui:
        comfyui = existing.check_comfyui(options.comfyui)
        where = Environment(comfyui, existing.find_python(comfyui, options.python))
        guest, variables = ["--guest"], dict(os.environ)
        output = _make_folder(options.output)
    else:
        output = _make_folder(options.output)
        where = environment.prepare()
        guest, variables = [], _without_pythonpath()
    inner = ["demo-in-host-python", *guest, str(where.comfyui), str(output)]
    return _go_on_with([str(where.python), str(PACK / "run.py"), *inner], variables)


def _demo_in_host_python(options: argparse.Namespace, _: list[str]) -> int:
    from .client import WorkflowError  # its packages are in ComfyUI's Python only
    from .demo import run_demo

    try:
        run_demo(Environment(options.comfyui, Path(sys.executable)), options.output, options.guest)
    except WorkflowError as error:
        raise LauncherError(f"{error.traceback}{error}") from error
    return 0


def _test(_: argparse.Namespace, arguments: list[str]) -> int:
    where = environment.prepare()
    if not any(_is_test_path(argument) for argument in arguments):
        arguments = [*arguments, str(TESTS)]
    # -P and no PYTHONPATH: with the pack's root on sys.path its folder `nodes` would hide the host's module `nodes`
    settings = ["-c", str(TESTS / "pytest.ini"), "--rootdir", str(TESTS)]
    return _go_on_with([str(where.python), "-P", "-m", "pytest", *settings, *arguments], _without_pythonpath())


def _bench(options: argparse.Namespace, _: list[str]) -> int:
    """Run one of benchmarks/*.py inside the ComfyUI of .host/; it writes its tables and figures to docs/."""
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "def main(" in path.read_text(encoding="utf-8"))
    if options.name not in names:
        raise LauncherError(f"there is no benchmark {options.name!r}; there are: {', '.join(names)}")
    where = environment.prepare()
    inner = ["bench-in-host-python", options.name]
    return _go_on_with([str(where.python), str(PACK / "run.py"), *inner], _without_pythonpath())


def _bench_in_host_python(options: argparse.Namespace, _: list[str]) -> int:
    from importlib import import_module

    from . import in_process  # torch is in ComfyUI's Python only

    in_process.import_host()
    in_process.import_pack()
    import_module(f"{in_process.NAME}.benchmarks.{options.name}").main()
    return 0


def _make_folder(output: Path) -> Path:
    """Make it and see that files can be written there, before the long part."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LauncherError(f"--output {output}: no folder can be made there ({error.strerror}).") from error
    try:
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise LauncherError(f"--output {output}: nothing can be written there ({error.strerror}).") from error
    return output.resolve()


def _without_pythonpath() -> dict[str, str]:
    """The environment less PYTHONPATH: what it names was not made for .host/."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _is_test_path(argument: str) -> bool:
    path = Path(argument.split("::")[0]).resolve()
    return path.is_relative_to(TESTS) and path.exists()


def _go_on_with(command: list[str], variables: dict[str, str]) -> int:
    """Go on as another program, with its exit code as this one's."""
    # Threads that spin while they wait make everything crawl on a machine that does something else too.
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.stdout.flush()
    if os.name == "nt":  # exec does not wait there
        return subprocess.run(command, env=variables).returncode
    os.execve(command[0], command, variables)


def _end_in_good_order_on_signals() -> None:
    """What ends a program without a word should run its `finally` clauses too."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))

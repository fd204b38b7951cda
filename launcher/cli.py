"""The command line of run.py.

Each command first makes sure of a ComfyUI with any Python, then goes on with the Python of that ComfyUI.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from . import in_process
from .environment import HOME, PACK, Environment, LauncherError, existing, link_folder, missing_test_tools, prepare

TESTS = PACK / "tests"
BENCHMARKS = PACK / "benchmarks"
END_S = 10.0  # for the tests to end when they are interrupted
IN_ONE_PROCESS = re.compile(r"-[qvx]*[ns]|--(numprocesses|capture|pdb|trace|collect-only|co$)|.*no:xdist")


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code; a wrong command line ends the program with a message."""
    options, others = _parse(arguments)
    for name in ("SIGTERM", "SIGHUP"):  # these should run the `finally` clauses too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        return options.run(options, others)
    except LauncherError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 128 + signal.SIGINT


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the arguments for pytest."""
    parser = argparse.ArgumentParser(prog="run.py", description="The pack's demo and tests, in a real ComfyUI.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="make contact sheets of density levels", description=_demo.__doc__)
    demo.add_argument("--output", type=Path, default=PACK / "output", help="where the images go (default: output/)")
    test = commands.add_parser(
        "test", help="run checks and tests; what it does not know goes to pytest", description=_test.__doc__, allow_abbrev=False
    )
    bench = commands.add_parser("bench", help="run a benchmark of benchmarks/", description=_bench.__doc__)
    bench.add_argument("name", help="its file's name, without .py")
    inner = commands.add_parser("in-host-python")  # what demo and bench go on with; no help, so not listed
    inner.add_argument("arguments", nargs="+")
    for command, run in ((demo, _demo), (test, _test), (bench, _bench), (inner, _in_host_python)):
        command.set_defaults(run=run, comfyui=None, python=None)
    for command in (demo, test):
        command.add_argument("--comfyui", type=Path, metavar="PATH", help="use this ComfyUI (default: one made in .host/)")
        command.add_argument("--python", type=Path, metavar="PATH", help="the Python that starts it (default: looked for)")
    options, others = parser.parse_known_args(arguments)
    if others and options.run is not _test:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if options.python and not options.comfyui:
        parser.error("--python goes with --comfyui: it is the Python that starts that ComfyUI")
    return options, others


def _demo(options: argparse.Namespace, _: list[str]) -> int:
    """Start a ComfyUI, make 4 seeds by 5 density levels, and stop it again. Nothing is written into a ComfyUI given."""
    given = existing(options.comfyui, options.python) if options.comfyui else None
    output = _make_folder(options.output)
    where = given or prepare()
    return _go_on(where, _variables(given), "demo", str(where.comfyui), str(output))


def _bench(options: argparse.Namespace, _: list[str]) -> int:
    """Run one of benchmarks/*.py inside the ComfyUI of .host/; it writes its tables and figures to docs/."""
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "def main(" in path.read_text(encoding="utf-8"))
    if options.name not in names:
        raise LauncherError(f"there is no benchmark {options.name!r}; there are: {', '.join(names)}")
    return _go_on(prepare(), _variables(None), "bench", options.name)


def _in_host_python(options: argparse.Namespace, _: list[str]) -> int:
    command, *arguments = options.arguments
    if command == "demo":
        from .demo import run_demo  # which needs what is in ComfyUI's Python only

        comfyui, output = map(Path, arguments)
        run_demo(Environment(comfyui, Path(sys.executable)), output)
    else:
        in_process.import_host()
        in_process.import_pack()
        importlib.import_module(f"{in_process.NAME}.benchmarks.{arguments[0]}").main()
    return 0


def _test(options: argparse.Namespace, arguments: list[str]) -> int:
    """Without arguments: ruff, mypy and all tests. With some, such as files of tests/ or -k: those tests. Tests run in as
    many processes as there are cores, or as -n says; with -s, --pdb or -p no:xdist in one. In a ComfyUI given: tests
    only; nothing is written into it."""
    given = existing(options.comfyui, options.python) if options.comfyui else None
    if given and (missing := missing_test_tools(given.python)):
        install = f"{given.python} -m pip install {' '.join(missing)}"
        raise LauncherError(f"{given.python} lacks what the tests need. This helps: {install}")
    where = given or prepare()
    # -P: with the pack's root on sys.path its folder `nodes` would hide the host's module `nodes`
    module = [str(where.python), "-P", "-m"]
    variables = _variables(given) | {"DENSITY_GUIDANCE_COMFYUI": str(where.comfyui)}
    failed = [] if given or arguments else _failed_checks(module, variables)

    named = any(_is_test(Path(argument.split("::")[0])) for argument in arguments)
    pytest = [*module, "pytest", "-c", str(TESTS / "pytest.ini"), "--rootdir", str(TESTS), *arguments]
    pytest += [] if named else [str(TESTS)]
    spread = ["--dist", "loadgroup"]  # see tests/conftest.py
    if not any(map(IN_ONE_PROCESS.match, arguments)):
        pytest += ["-n", "logical", *spread]
    elif any(argument.startswith(("-n", "--numprocesses")) for argument in arguments):
        pytest += spread
    code = _wait_for(pytest, variables)
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return code or int(bool(failed))


def _failed_checks(module: list[str], variables: dict[str, str]) -> list[str]:
    """Run formatter and type checker, and return the names of those that found something."""
    with tempfile.TemporaryDirectory() as folder:  # where the pack has a package's name, as in ComfyUI it need not have
        link_folder(PACK, Path(folder, in_process.NAME))
        packages = [argument for room in ("dg_core", "nodes") for argument in ("-p", f"{in_process.NAME}.{room}")]
        settings = ["--config-file", str(PACK / "pyproject.toml"), "--cache-dir", str(HOME / "mypy_cache")]
        checks = {
            "ruff check": (["ruff", "check", "."], PACK),
            "ruff format": (["ruff", "format", "--check", "."], PACK),
            "mypy": (["mypy", *settings, *packages], folder),
        }
        return [name for name, (command, place) in checks.items() if _wait_for([*module, *command], variables, place)]


def _is_test(path: Path) -> bool:
    return path.exists() and path.resolve().is_relative_to(TESTS)


def _make_folder(output: Path) -> Path:
    """Make it and see that files can be written there, before the long part."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise LauncherError(f"--output {output}: images cannot be saved there ({error.strerror}).") from error
    return output.resolve()


def _variables(given: Environment | None) -> dict[str, str]:
    """The environment for ComfyUI's Python."""
    # Threads that spin while they wait make everything crawl on a machine that does something else too.
    variables = {"OMP_WAIT_POLICY": "PASSIVE"} | dict(os.environ)
    if given:
        variables["PYTHONDONTWRITEBYTECODE"] = "1"  # nothing is written into it
    else:
        variables.pop("PYTHONPATH", None)  # what it names was not made for .host/
    return variables


def _go_on(where: Environment, variables: dict[str, str], *arguments: str) -> int:
    """Go on in ComfyUI's Python, with its exit code as this one's."""
    command = [str(where.python), str(PACK / "run.py"), "in-host-python", *arguments]
    sys.stdout.flush()
    if os.name == "nt":  # exec does not wait there
        return _wait_for(command, variables)
    os.execve(command[0], command, variables)


def _wait_for(command: list[str], variables: dict[str, str], folder: Path | str | None = None) -> int:
    sys.stdout.flush()
    with subprocess.Popen(command, env=variables, cwd=folder) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # of which the terminal has told it as well
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            raise
        finally:
            process.terminate()  # if it has not ended

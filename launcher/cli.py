"""The command line of run.py.

Each command first makes sure of a ComfyUI with any Python, then becomes a program in the Python of that ComfyUI.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from . import in_process, sweep
from .environment import PACK, REQUIREMENTS, Environment, LauncherError, existing, prepare, prepare_sweep, variables

TESTS = PACK / "tests"
TEST_TOOLS = REQUIREMENTS.read_text(encoding="utf-8").split("# test tools")[1].split()
BENCHMARKS = [path.stem for path in sorted(PACK.glob("benchmarks/*.py")) if "def main(" in path.read_text(encoding="utf-8")]
GO_ON = "in-host-python"  # the command, not a user's, that demo and bench go on with


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code; a wrong command line ends the program with a message."""
    for name in ("SIGTERM", "SIGHUP"):  # these should run the `finally` clauses too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        if arguments[:1] == [GO_ON]:
            _in_host_python(*arguments[1:])
        else:
            options = _parse(arguments)
            options.run(options)
    except LauncherError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The options; `run` is the command's function, `pytest` what the test command does not know."""
    parser = argparse.ArgumentParser(prog="run.py", description="The pack's demo, tests and benchmarks, in a real ComfyUI.")
    commands = parser.add_subparsers(required=True)
    demo = commands.add_parser("demo", help="make contact sheets of density levels", description=_demo.__doc__)
    demo.add_argument("--output", type=Path, default=PACK / "output", help="where the images go (default: output/)")
    test = commands.add_parser("test", help="run the tests, or some of them", description=_test.__doc__, allow_abbrev=False)
    test.usage = "run.py test [-h] [--comfyui PATH [--python PATH]] [pytest arguments ...]"
    test.epilog = "All other arguments go to pytest, such as tests/test_masks.py, -k mask, -x or -s."
    bench = commands.add_parser("bench", help="run a benchmark of benchmarks/", description=_bench.__doc__)
    bench.add_argument("name", choices=BENCHMARKS)
    many = commands.add_parser("sweep", help="run a workflow with many settings, on many machines", description=_sweep.__doc__)
    many.add_argument("workflow", type=Path, nargs="?", metavar="WORKFLOW.json", help="in API format: Workflow > Export (API)")
    many.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUES",
        help="NODE: id or title; VALUES: a,b,c "
        "or first:last:count or @file with one in each line. Several give every combination",
    )
    many.add_argument("--zip", action="store_true", help="pair the values of several --set instead")
    many.add_argument("--out", type=Path, metavar="DIR", help="where everything goes; the same folder resumes")
    many.add_argument(
        "--workers", type=int, metavar="N", help="at most so many ComfyUIs (default: one for each GPU, or machine)"
    )
    many.add_argument("--cpus", type=int, default=1, metavar="N", help="cores, and so threads, of each of them (default: 1)")
    many.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="for one prompt (default: 600)")
    many.add_argument("--retry", action="store_true", help="run those again that failed")
    many.add_argument("--address", help="of a Ray cluster: auto, or ray://HOST:10001 (default: this machine alone)")
    many.add_argument("--report", type=Path, metavar="DIR", help="only show how far the sweep in DIR is, also while it runs")
    for command, run in ((demo, _demo), (test, _test), (bench, _bench), (many, _sweep)):
        command.set_defaults(run=run, comfyui=None, python=None, error=command.error)
    for command in (demo, test, many):
        command.add_argument("--comfyui", type=Path, metavar="PATH", help="use this ComfyUI (default: one made in .host/)")
        command.add_argument("--python", type=Path, metavar="PATH", help="the Python that starts it (default: looked for)")
    options, others = parser.parse_known_args(arguments)
    options.pytest = others
    if others and options.run is not _test:
        options.error(f"unrecognized arguments: {' '.join(others)}")
    if options.python and not options.comfyui:
        options.error("--python goes with --comfyui: it is the Python that starts that ComfyUI")
    return options


def _demo(options: argparse.Namespace) -> None:
    """Start a ComfyUI, make 4 seeds by 5 density levels, and stop it again. A ComfyUI that --comfyui names is not changed."""
    given = _given(options)
    output = _make_folder(options.output)
    _go_on(given or prepare(), "demo", str(output))


def _bench(options: argparse.Namespace) -> None:
    """Run one of benchmarks/*.py inside the ComfyUI of .host/; it writes its tables and figures to docs/."""
    _go_on(prepare(), "bench", options.name)


def _test(options: argparse.Namespace) -> None:
    """Run the tests, which include ruff and mypy, in as many processes as there are cores, or as -n says; with -s, --pdb or
    -p no:xdist in one. With --comfyui: without ruff and mypy, and that ComfyUI is not changed."""
    some = _names_tests(options.pytest)
    where = _given(options, TEST_TOOLS) or prepare()
    spread = [] if any("no:xdist" in argument for argument in options.pytest) else ["-n", "logical", "--dist", "loadgroup"]
    # -P: with the pack's root on sys.path its folder `nodes` would hide the host's module `nodes`
    pytest = ["-P", "-m", "pytest", "-c", str(TESTS / "pytest.ini"), "--rootdir", str(TESTS)]
    _become(where, *pytest, *spread, *options.pytest, *([] if some else [str(TESTS)]))


def _sweep(options: argparse.Namespace) -> None:
    """Run a workflow with every combination of settings, in ComfyUIs that Ray starts. Images, and a table of them, go to --out;
    what is there is not run again."""
    if options.report:
        sweep.read_head(options.report)
        _become(
            Environment(in_process.COMFYUI, prepare_sweep()),
            str(PACK / "run.py"),
            GO_ON,
            "report",
            str(options.report.resolve()),
        )
    if not (options.workflow and options.set and options.out):
        options.error("a sweep needs WORKFLOW.json, --set and --out (or --report)")
    if min(1 if options.workers is None else options.workers, options.cpus, options.limit) <= 0:
        options.error("--workers, --cpus and --limit are above 0")
    axes, prompts = sweep.plan(options.workflow, options.set, options.zip)
    sweep.open_folder(options.out, axes, prompts)
    print(f"{' x '.join(str(len(axis['values'])) for axis in axes)} values: {len(prompts)} prompts.", flush=True)
    host = _given(options) or prepare()
    names = ("set", "zip", "workers", "cpus", "limit", "retry", "address")
    asked = {name: getattr(options, name) for name in names}
    asked |= {"workflow": str(options.workflow.resolve()), "out": str(options.out.resolve()), "python": str(host.python)}
    _become(Environment(host.comfyui, prepare_sweep()), str(PACK / "run.py"), GO_ON, "sweep", json.dumps(asked))


def _in_host_python(command: str, *arguments: str) -> None:
    """What a command goes on with in the Python that it needs."""
    if command == "demo":
        from .demo import run_demo  # which needs what is in ComfyUI's Python only

        run_demo(Environment(in_process.COMFYUI, Path(sys.executable)), Path(*arguments))
    elif command == "serve":
        from .host import serve

        serve(Environment(in_process.COMFYUI, Path(sys.executable)))
    elif command == "report":  # this and the next in Ray's Python
        from .sweep_report import report

        report(Path(*arguments))
    elif command == "sweep":
        from .sweep_workers import run

        asked = json.loads(arguments[0])
        _, prompts = sweep.plan(Path(asked["workflow"]), asked["set"], asked["zip"])
        where, out = Environment(in_process.COMFYUI, Path(asked["python"])), Path(asked["out"])
        run(prompts, where, out, *(asked[name] for name in ("workers", "address", "cpus", "limit", "retry")))
        _in_host_python("report", asked["out"])
    else:
        in_process.import_host()
        in_process.import_pack()
        importlib.import_module(f"{in_process.NAME}.benchmarks.{arguments[0]}").main()


def _given(options: argparse.Namespace, tools: Iterable[str] = ()) -> Environment | None:
    """The ComfyUI that the options name, if they do. Raises LauncherError where it lacks something."""
    return existing(options.comfyui, options.python, tools) if options.comfyui else None


def _names_tests(arguments: list[str]) -> bool:
    """Whether some of them are tests, such as tests/test_masks.py::test_name. Raises LauncherError for a missing file."""
    found = False
    for before, argument in zip(["", *arguments], arguments):
        path = Path(argument.split("::")[0])
        if os.path.exists(path):
            found |= path.resolve().is_relative_to(TESTS)
        elif path.suffix == ".py" and not argument.startswith("-") and before not in ("-k", "-m"):
            raise LauncherError(f"there is no file {path}. The tests are in {TESTS}.")
    return found


def _make_folder(output: Path) -> Path:
    """Make it and see that files can be written there, before the long part."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise LauncherError(f"--output {output}: images cannot be saved there ({error.strerror}).") from error
    return output.resolve()


def _go_on(where: Environment, *arguments: str) -> NoReturn:
    """Go on with `_in_host_python` in ComfyUI's Python."""
    _become(where, str(PACK / "run.py"), GO_ON, *arguments)


def _become(where: Environment, *arguments: str) -> NoReturn:
    """Become ComfyUI's Python with these arguments: so signals reach it as they are, and its exit code is this one's."""
    sys.stdout.flush()
    command = [str(where.python), *arguments]
    if os.name == "nt":  # exec does not wait there
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both, and ends the other one
        sys.exit(subprocess.call(command, env=variables(where)))
    os.execve(command[0], command, variables(where))

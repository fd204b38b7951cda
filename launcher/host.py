"""A running ComfyUI, headless, on a free port of 127.0.0.1, ended with everything it started however the run ends."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from .client import Client
from .environment import PACK, Environment, LauncherError, link_folder
from .guardian import started
from .in_process import has_accelerator

START_S = 180.0  # a first start compiles everything that it imports
LOG_TAIL = 40  # lines
NAME = "density-guidance"  # of the pack's folder in custom_nodes/


@dataclass(frozen=True)
class Host:
    """What a test or the demo needs to know of a running ComfyUI; `pid` is its process, `output` where it saves images."""

    pid: int
    output: Path
    log: Path
    client: Client

    def log_tail(self) -> str:
        """The last lines of its log."""
        return _tail(self.log)

    def saved_files(self, entry: dict) -> list[Path]:
        """The files that a finished prompt's history entry says it saved in the output folder, in its order."""
        return [
            self.output / item["subfolder"] / item["filename"]
            for output in entry["outputs"].values()
            for items in output.values()
            for item in items
            if isinstance(item, dict) and item.get("type") == "output"
        ]


@contextlib.contextmanager
def running_host(where: Environment, output: Path | None, start_s: float = START_S, whole: bool = False) -> Iterator[Host]:
    """Start ComfyUI with this pack and no other, yield it once it answers, and end it with all that it started.

    It saves images in the folder `output`, made if missing, and writes all else to a temporary one (None: images too). whole:
    with its own models, inputs and packs. Raises LauncherError with the end of its log where it ends, or has not answered after
    `start_s` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="density-guidance-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder).resolve()
        output = (output or scratch / "output").resolve()  # ComfyUI runs in its own folder
        output.mkdir(parents=True, exist_ok=True)
        log = scratch / "comfyui.log"
        command = [str(where.python), "main.py", *_arguments(scratch, output, where.comfyui if whole else None)]
        with log.open("wb") as log_file, started(command, scratch, where.comfyui, log_file) as process:
            host = Host(process.pid, output, log, Client(_address(process, log, start_s)))
            host.client.get("/system_stats")
            yield host


def serve(where: Environment) -> None:
    """For a process of another Python: a whole ComfyUI, until stdin ends. Prints where it is."""
    with running_host(where, None, whole=True) as host:
        print(json.dumps({"url": host.client.url, "output": str(host.output), "pid": host.pid}), flush=True)
        sys.stdin.read()


def _arguments(scratch: Path, output: Path, whole: Path | None) -> list[str]:
    """`scratch` is the place of everything but ComfyUI's code and the images: no other pack of the user is there, which might
    be slow to start, change files or open ports, but those of `whole`. The free port is chosen by the operating system."""
    for name in ("custom_nodes", "user", *(() if whole else ("input",))):
        (scratch / name).mkdir()
    link_folder(PACK, scratch / "custom_nodes" / NAME)
    if whole:
        for name in ("models", "input"):
            (whole / name).mkdir(exist_ok=True)
            link_folder(whole / name, scratch / name)
        for pack in (whole / "custom_nodes").iterdir():
            if pack.is_dir() and pack.resolve() != PACK and pack.name not in (NAME, "__pycache__"):
                link_folder(pack, scratch / "custom_nodes" / pack.name)
    return [
        *("--base-directory", str(scratch), "--output-directory", str(output)),
        *("--database-url", f"sqlite:///{scratch / 'comfyui.db'}"),
        # an extra_model_paths.yaml may name more of them
        *([] if whole else ["--disable-all-custom-nodes", "--whitelist-custom-nodes", NAME]),
        *("--listen", "127.0.0.1", "--port", "0", "--disable-auto-launch", "--disable-api-nodes"),
        *([] if has_accelerator() else ["--cpu"]),
    ]


def _address(process: subprocess.Popen, log: Path, start_s: float) -> str:
    """Where ComfyUI listens, as soon as it does."""
    give_up = time.monotonic() + start_s
    while process.poll() is None and time.monotonic() < give_up:
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(process.pid)
            connections = getattr(found, "net_connections", None) or found.connections  # psutil older than 6
            for connection in connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    return f"http://127.0.0.1:{connection.laddr.port}"
        time.sleep(0.1)
    ended = f"ended before it was ready, with exit code {process.returncode}"
    problem = ended if process.returncode is not None else f"did not answer within {start_s:g} s"
    raise LauncherError(f"ComfyUI {problem}. The end of its log:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])

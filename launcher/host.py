"""A running ComfyUI, headless, on a free port of 127.0.0.1, ended with everything it started however the run ends."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .client import Client
from .environment import Environment
from .errors import LauncherError
from .existing import guest_arguments

ADDRESS = "127.0.0.1"
START_S = 180.0  # a first start compiles everything that it imports
STOP_S = 15.0  # the guardian needs less: this is for when it hangs
PORT_TRIES = 3
LOG_TAIL = 40  # lines

_GUARDIAN = Path(__file__).with_name("guardian.py")
_HAS_ACCELERATOR = """
import torch
any_kind = getattr(torch, "accelerator", None)  # torch 2.6 or newer
print(any_kind.is_available() if any_kind else torch.cuda.is_available() or torch.backends.mps.is_available())
"""


@dataclass(frozen=True)
class Host:
    """What a test or the demo needs to know of a running ComfyUI."""

    port: int
    pid: int  # of its guardian; the leader of its process group, except on Windows
    output: Path
    input: Path
    log: Path
    client: Client

    def log_tail(self) -> str:
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
def running_host(where: Environment, output: Path, guest: bool = False, start_s: float = START_S) -> Iterator[Host]:
    """Start ComfyUI, yield it once it answers, and end it with all that it started.

    Args:
        output: folder for saved pictures; made if missing. Everything else goes to a temporary folder.
        guest: the ComfyUI is the user's: lend it the pack, and load no other.
        start_s: how long it may take to answer.

    Raises:
        LauncherError: it ended or did not answer in time; the message shows the end of its log.
    """
    output = output.resolve()  # ComfyUI runs in its own folder
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="density-guidance-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder).resolve()
        for name in ("input", "user"):
            (scratch / name).mkdir()
        arguments = _arguments(scratch, output)
        if guest:
            arguments += guest_arguments(scratch)
        if not _has_accelerator(where.python):
            arguments.append("--cpu")
        for _ in range(PORT_TRIES):
            port = free_port()
            log = scratch / f"comfyui-{port}.log"
            command = [str(where.python), "main.py", "--port", str(port), *arguments]
            with _guarded(command, where.comfyui, scratch, log) as process:
                if _wait_until_ready(process, port, scratch, log, start_s):
                    client = Client(f"http://{ADDRESS}:{port}")
                    yield Host(port, process.pid, output, scratch / "input", log, client)
                    return
        raise LauncherError(
            f"ComfyUI could not be started: {PORT_TRIES} ports in turn were free and then taken. Try again."
        )


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]


def _arguments(scratch: Path, output: Path) -> list[str]:
    """Keep every file but the pictures, and the database, away from ComfyUI's own folders."""
    return [
        *("--listen", ADDRESS, "--disable-auto-launch", "--disable-api-nodes"),
        *("--output-directory", str(output), "--input-directory", str(scratch / "input")),
        *("--temp-directory", str(scratch), "--user-directory", str(scratch / "user")),
        *("--database-url", f"sqlite:///{scratch / 'comfyui.db'}"),
    ]


@functools.cache
def _has_accelerator(python: Path) -> bool:
    """Whether PyTorch in that Python has a GPU; without one ComfyUI has to be told --cpu."""
    result = subprocess.run([str(python), "-c", _HAS_ACCELERATOR], capture_output=True, text=True)
    if result.returncode:
        raise LauncherError(f"{python} cannot import PyTorch, which ComfyUI needs:\n{result.stderr.strip()}")
    return result.stdout.strip() == "True"


@contextlib.contextmanager
def _guarded(command: list[str], folder: Path, scratch: Path, log: Path) -> Iterator[subprocess.Popen]:
    """Run the command under the guardian, in a process group of its own, its output in the file `log`."""
    # safe-path mode would keep main.py from importing the modules beside it
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    # of its own also so that Ctrl-C reaches the launcher alone, which then ends ComfyUI in good order
    own_group = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            [command[0], str(_GUARDIAN), str(scratch), *command],
            cwd=folder,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            **own_group,
        )
    try:
        yield process
    finally:
        try:
            process.stdin.close()  # the guardian's sign to end ComfyUI
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also on a second Ctrl-C, and when the guardian itself was killed
            _kill_group(process)


def _kill_group(process: subprocess.Popen) -> None:
    if os.name == "nt":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing left in it, as it should be
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_until_ready(process: subprocess.Popen, port: int, scratch: Path, log: Path, start_s: float) -> bool:
    """True once ComfyUI answers; False if another program took its port before it did."""
    give_up = time.monotonic() + start_s
    while time.monotonic() < give_up:
        if process.poll() is not None:
            if _is_listening(port):
                return False
            raise LauncherError(f"ComfyUI ended before it was ready. The end of its log:\n{_tail(log)}")
        if _answers(port, scratch):
            return True
        time.sleep(0.1)
    raise LauncherError(f"ComfyUI did not answer within {start_s:g} s. The end of its log:\n{_tail(log)}")


def _answers(port: int, scratch: Path) -> bool:
    """Whether the ComfyUI that was given this scratch folder answers on the port, and not someone else's."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{ADDRESS}:{port}/system_stats", timeout=5) as response:
            return str(scratch) in json.load(response)["system"]["argv"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((ADDRESS, port)) == 0


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])

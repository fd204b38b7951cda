"""Processes that end with the one that started them, whatever ends that one.

What `started` runs, and all that it starts in turn, inherits an environment variable with the name of its temporary folder:
so it is found again, also where its own parent is gone. For the case that the launcher is killed, a guardian (this file as a
script: `guardian.py SCRATCH`) waits at the other end of a pipe, which the operating system closes then.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

MARK = "DENSITY_GUIDANCE_SCRATCH"
GRACE_S = 5.0  # to end by itself when asked to, before it is killed


@contextlib.contextmanager
def started(
    command: list[str], scratch: Path, folder: Path | None = None, log: IO | int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen]:
    """Run a command in `folder`, and end it with all that it started when the `with` block or this process ends, however.

    scratch: its temporary folder, no other command's, removed at the end. log: an open file for its output.
    """
    # safe-path mode would keep a script from importing the modules beside it
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"} | {MARK: str(scratch)}
    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    # sessions of their own, so that Ctrl-C reaches this process alone, which ends them in good order
    guardian = subprocess.Popen([sys.executable, __file__, str(scratch)], stdin=subprocess.PIPE, start_new_session=True)
    with guardian, subprocess.Popen(command, cwd=folder, env=variables, start_new_session=True, **streams) as process:
        try:
            yield process
        finally:
            end_all(scratch)


def end_all(scratch: Path) -> None:
    """End every process whose environment names `scratch`; returns when they are gone."""
    for how in ("terminate", "kill", "kill"):  # again, for what one may have started while it ended
        processes = [process for process in psutil.process_iter() if _is_marked(process, scratch)]
        for process in processes:
            with contextlib.suppress(psutil.Error):
                getattr(process, how)()
        psutil.wait_procs(processes, GRACE_S)


def _is_marked(process: psutil.Process, scratch: Path) -> bool:
    try:
        return process.environ().get(MARK) == str(scratch)
    except (psutil.Error, OSError):  # it is another user's, or has ended
        return False


if __name__ == "__main__":
    sys.stdin.read()  # returns when the launcher closes its end, or is gone
    end_all(Path(sys.argv[1]))
    shutil.rmtree(sys.argv[1], ignore_errors=True)

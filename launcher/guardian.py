"""Runs a command, and ends it with all that it started as soon as standard input closes.

    python guardian.py SCRATCH COMMAND [ARGUMENT...]

The launcher holds the other end of standard input. The operating system closes that end when the launcher ends,
whatever ends it (kill -9 too), so neither ComfyUI nor its temporary folder SCRATCH outlives it. This is a script of its
own, run with the Python of ComfyUI: it imports nothing of the pack.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading

GRACE_S = 5.0  # for ComfyUI to end by itself, before it is killed


def main() -> None:
    scratch, command = sys.argv[1], sys.argv[2:]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    launcher_is_gone = threading.Event()
    threading.Thread(target=_end_with_launcher, args=(child, launcher_is_gone), daemon=True).start()
    print(f"ComfyUI ended with exit code {child.wait()}", flush=True)
    if launcher_is_gone.is_set():  # otherwise it may still want to read the log
        shutil.rmtree(scratch, ignore_errors=True)
    if os.name != "nt":
        os.killpg(os.getpgrp(), signal.SIGKILL)  # what the command may have left behind, and this process with it


def _end_with_launcher(child: subprocess.Popen, launcher_is_gone: threading.Event) -> None:
    os.read(0, 1)  # returns when the launcher closes its end, or is gone
    launcher_is_gone.set()
    if os.name == "nt":  # it has no process groups: while their parent lives, its children can be found
        import psutil  # one of ComfyUI's requirements

        for process in psutil.Process().children(recursive=True):
            process.kill()
        return
    child.send_signal(signal.SIGINT)  # as Ctrl-C would
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()


if __name__ == "__main__":
    main()

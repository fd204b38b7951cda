"""A lock between processes, let go by the operating system when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int) -> None:
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

    def _lock(fd: int) -> None:
        while True:  # LK_LOCK gives up after ten tries, a second apart
            with contextlib.suppress(OSError):
                return msvcrt.locking(fd, msvcrt.LK_LOCK, 1)

else:
    import fcntl

    def _try_lock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _lock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX)


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[tuple[int, ...]]:
    """Hold the lock file `path`; `on_wait` is called once if another process has it.

    Yields the file descriptors to pass on (`pass_fds`) to child processes that must hold the lock as well, so that it
    stays taken should this process be killed before them. Windows has no such thing: there the tuple is empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            _try_lock(file.fileno())
        except OSError:
            on_wait()
            _lock(file.fileno())
        yield () if sys.platform == "win32" else (file.fileno(),)
